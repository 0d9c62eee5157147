"""Messages to text: the model's chat template where it has one, a plain format where not."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ..common.errors import RecipeError

Message = dict[str, str]

PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
# Stands for an answer, to find where the template writes one.
_ANSWER = "SOMF-ANSWER"
# Keywords with which templates close the thought that their generation prompt would open.
_CLOSES_THOUGHT = ("enable_thinking", "thinking")
_THOUGHT = r"(?P<open><|\[)(?P<name>(?:\w+:)?(?:think|thinking|thought|reasoning))(?P<close>>|\])"
_OPENED = re.compile(_THOUGHT + r"\s*$", re.IGNORECASE)
_BEGUN = re.compile(
    r"\s*(?:" + _THOUGHT + r"|<\|channel\|>analysis|<\|channel>thought)", re.IGNORECASE
)
_ENDED = re.compile(
    r"<\|channel\|>final<\|message\|>|<channel\|>|" + _THOUGHT.replace(r"(?P<name>", "/(?P<name>"),
    re.IGNORECASE,
)
_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcdDeFGhHIjmMnprRStTuUVwWxXyYzZ"


@dataclass(frozen=True)
class Rendering:
    """How a chat template is rendered beside its messages.

    Attributes:
        keywords: further variables of the template, such as ``enable_thinking``.
        date: the day that a template writes as today's, as 2026-11-30; the clock's where None.
        moves_system: whether an opening system message's text stands before the first user's, as
            for a template that has no place for it.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    moves_system: bool = False


@dataclass(frozen=True)
class Opening:
    """What an answer follows.

    Attributes:
        text: up to the answer: with the generation prompt, or past the thought that it opens.
        skipped: characters of the finished conversation that stand before the answer in it.
        how: the conversation is rendered.
    """

    text: str
    skipped: int
    how: Rendering


def rendered(
    tokenizer: Any, messages: Sequence[Message], how: Rendering, *, open_answer: bool
) -> str:
    """Return a conversation as text, with the generation prompt where ``open_answer``.

    Without a chat template, it is ``User: <prompt>``, ``Assistant: <answer>``, blocks parted by an
    empty line, and ``Assistant:`` as the generation prompt.

    Raises:
        RecipeError: the template refuses it.
    """
    written = _system_moved(messages) if how.moves_system else messages
    if not tokenizer.chat_template:
        blocks = [f"{PLAIN_ROLES.get(m['role'], m['role'])}: {m['content']}" for m in written]
        return "\n\n".join([*blocks, "Assistant:"] if open_answer else blocks)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(written),
                chat_template=_dated(tokenizer.get_chat_template(), how.date),
                tokenize=False,
                add_generation_prompt=open_answer,
                **how.keywords,
            )
        )
    except Exception as error:
        # A template may put into its words what it refuses, which may be harmful.
        quotes = any(m["content"] and m["content"] in str(error) for m in messages)
        raise _refused(messages, f": {type(error).__name__ if quotes else error}") from error


def asked(tokenizer: Any, messages: Sequence[Message], how: Rendering) -> tuple[str, Rendering]:
    """Return a prompt as a model is asked, with the generation prompt, and how it is rendered.

    A system message that the template refuses or leaves out is put before the first user message,
    with an empty line between, as Gemma's documentation has it
    (https://ai.google.dev/gemma/docs/formatting).

    Raises:
        RecipeError: the template refuses the conversation, or leaves a message out.
    """
    moved = how if _system_moved(messages) == messages else replace(how, moves_system=True)
    try:
        text = rendered(tokenizer, messages, how, open_answer=True)
    except RecipeError:
        if moved == how:
            raise
        return asked(tokenizer, messages, moved)
    left_out = _left_out(tokenizer, text, messages, how)
    if left_out and moved != how:
        return asked(tokenizer, messages, moved)
    if left_out:
        raise _refused(messages, f", of which it leaves {left_out} out")
    return text, how


def finished(tokenizer: Any, messages: Sequence[Message], answer: str, how: Rendering) -> str:
    """Return a conversation that ends with ``answer``, without white space behind it.

    Raises:
        RecipeError: the template refuses it.
    """
    # The plain format has a blank before an answer, and none behind it.
    content = answer if tokenizer.chat_template else answer.strip()
    whole = [*messages, {"role": "assistant", "content": content}]
    return rendered(tokenizer, whole, how, open_answer=False).rstrip()


def opening(tokenizer: Any, messages: Sequence[Message], how: Rendering) -> Opening:
    """Return what answers to ``messages`` follow.

    That is the rendered prompt, as a model is asked. Where it leaves a thought open, in which no
    answer belongs, it is the prompt that the template's own keyword gives (``enable_thinking:
    false``), or else all that the template writes before an answer in a finished conversation.

    Raises:
        RecipeError: the template refuses the conversation, or writes no answers.
    """
    prompt, how = asked(tokenizer, messages, how)
    before, found, _ = finished(tokenizer, messages, _ANSWER, how).rpartition(_ANSWER)
    if not found:
        raise RecipeError("the chat template doesn't write an assistant's answers")
    thought = _OPENED.search(prompt)
    if thought:
        for keyword in _CLOSES_THOUGHT:
            known = re.search(rf"\b{keyword}\b", tokenizer.get_chat_template())
            if known and keyword not in how.keywords:
                closed = replace(how, keywords={**how.keywords, keyword: False})
                other = rendered(tokenizer, messages, closed, open_answer=True)
                if not _OPENED.search(other):
                    return opening(tokenizer, messages, closed)
        still_open = before.startswith(prompt) and not _ENDED.search(before, len(prompt))
        end = "{open}/{name}{close}".format_map(thought.groupdict())
        return Opening(f"{before}\n{end}\n\n" if still_open else before, len(before), how)
    return Opening(prompt, len(before) - len(_written_between(prompt, before, messages)), how)


def opens_thought(tokenizer: Any, messages: Sequence[Message], how: Rendering) -> bool:
    """Return whether the generation prompt after ``messages`` leaves a thought open."""
    return bool(_OPENED.search(asked(tokenizer, messages, how)[0]))


def begins_thought(text: str) -> bool:
    """Return whether what a model writes begins with a thought."""
    return bool(_BEGUN.match(text))


def ends_thought(text: str) -> bool:
    """Return whether a thought ends in what a model writes."""
    return bool(_ENDED.search(text))


def after_thought(text: str) -> str:
    """Return what comes after the thought that an answer begins with; the text without one."""
    end = _ENDED.search(text)
    if end:
        return text[end.end() :].lstrip()
    return "" if begins_thought(text) else text


def writes_date(tokenizer: Any) -> bool:
    """Return whether the chat template writes the day on which it is rendered."""
    return bool(tokenizer.chat_template) and _CLOCK in tokenizer.get_chat_template()


def _system_moved(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages whose first one, of the system, is put before a user's that follows it."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    texts = [m["content"] for m in messages[:2]]
    return [{**messages[1], "content": "\n\n".join(texts)}, *messages[2:]]


def _written_between(prompt: str, before: str, messages: Sequence[Message]) -> str:
    """Return what a template writes after a prompt and before an answer, such as a blank.

    In a finished conversation it may have written the prompt otherwise: Mistral's put the system's
    text into the last message alone, where that is the user's.
    """
    asked_last = messages[-1]["content"].strip()
    if not before.startswith(prompt) and asked_last:
        prompt, before = (text.rpartition(asked_last)[2] for text in (prompt, before))
    return before[len(prompt) :] if before.startswith(prompt) else ""


def _left_out(tokenizer: Any, text: str, messages: Sequence[Message], how: Rendering) -> str | None:
    """Return the role of a message without which a prompt has the same text, None without one."""
    messages = _system_moved(messages) if how.moves_system else messages
    for number, message in enumerate(messages):
        if message["role"] in ("user", "assistant") or not message["content"].strip():
            continue
        others = [*messages[:number], *messages[number + 1 :]]
        try:
            if (
                rendered(tokenizer, others, replace(how, moves_system=False), open_answer=True)
                == text
            ):
                return message["role"]
        except RecipeError:
            continue
    return None


def _refused(messages: Sequence[Message], why: str) -> RecipeError:
    roles = ", ".join(m["role"] for m in messages)
    return RecipeError(
        f"the chat template refuses a conversation of the roles {roles}{why}. Leave such rows out, "
        "or set another template that takes them (the recipe's `chat_template`)"
    )


def _dated(template: str, date: str | None) -> str:
    """Return a template whose ``strftime_now`` writes ``date``, at midnight.

    It is a macro in front: it hides the function of the same name that reads the clock, and values
    that transformers hands to a template can't be functions.
    """
    if date is None or _CLOCK not in template:
        return template
    day = datetime.fromisoformat(date)
    written = ""
    for directive in (f"%{flag}{letter}" for flag in ("", "-") for letter in _DIRECTIVES):
        try:
            value = day.strftime(directive)
        except ValueError:
            continue
        written += f".replace({json.dumps(directive)}, {json.dumps(value, ensure_ascii=False)})"
    # The line's end is taken by trim_blocks, so that the template begins a line as before.
    return f"{{% macro {_CLOCK}(text) %}}{{{{ text{written} }}}}{{% endmacro %}}\n{template}"
