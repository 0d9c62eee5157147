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
_BEGUN = re.compile(r"\s*(?:" + _THOUGHT + r"|<\|channel\|>analysis)", re.IGNORECASE)
_ENDED = re.compile(
    r"<\|channel\|>final<\|message\|>|" + _THOUGHT.replace(r"(?P<name>", "/(?P<name>"),
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
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None


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
    if not tokenizer.chat_template:
        blocks = [f"{PLAIN_ROLES.get(m['role'], m['role'])}: {m['content']}" for m in messages]
        return "\n\n".join([*blocks, "Assistant:"] if open_answer else blocks)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                chat_template=_dated(tokenizer.get_chat_template(), how.date),
                tokenize=False,
                add_generation_prompt=open_answer,
                **how.keywords,
            )
        )
    except Exception as error:
        roles = ", ".join(m["role"] for m in messages)
        # A template may put into its words what it refuses, which may be harmful.
        quotes = any(m["content"] and m["content"] in str(error) for m in messages)
        why = type(error).__name__ if quotes else error
        raise RecipeError(
            f"the merge's chat template refuses a conversation of the roles {roles}: {why}. Use "
            "prompts without the refused role, or another template (the recipe's `chat_template`)."
        ) from error


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
    asked = rendered(tokenizer, messages, how, open_answer=True)
    before, found, _ = finished(tokenizer, messages, _ANSWER, how).rpartition(_ANSWER)
    if not found:
        raise RecipeError("the merge's chat template does not write an assistant's answers")
    thought = _OPENED.search(asked)
    if thought:
        for keyword in _CLOSES_THOUGHT:
            known = re.search(rf"\b{keyword}\b", tokenizer.get_chat_template())
            if known and keyword not in how.keywords:
                closed = replace(how, keywords={**how.keywords, keyword: False})
                other = rendered(tokenizer, messages, closed, open_answer=True)
                if not _OPENED.search(other):
                    return opening(tokenizer, messages, closed)
        still_open = before.startswith(asked) and not _ENDED.search(before, len(asked))
        end = "{open}/{name}{close}".format_map(thought.groupdict())
        return Opening(f"{before}\n{end}\n\n" if still_open else before, len(before), how)
    return Opening(asked, len(asked if before.startswith(asked) else before), how)


def opens_thought(tokenizer: Any, messages: Sequence[Message], how: Rendering) -> bool:
    """Return whether the generation prompt after ``messages`` leaves a thought open."""
    return bool(_OPENED.search(rendered(tokenizer, messages, how, open_answer=True)))


def begins_thought(text: str) -> bool:
    """Return whether what a model writes begins with a thought."""
    return bool(_BEGUN.match(text))


def ends_thought(text: str) -> bool:
    """Return whether a thought ends in what a model writes."""
    return bool(_ENDED.search(text))


def writes_date(tokenizer: Any) -> bool:
    """Return whether the chat template writes the day on which it is rendered."""
    return bool(tokenizer.chat_template) and _CLOCK in tokenizer.get_chat_template()


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
