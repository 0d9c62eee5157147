"""The conversations in a dataset's rows: prompts, answers, whole dialogues and their labels."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import quoted
from .chat import Message, user_prompt
from .dataset_reading import dataset_rows
from .rows import Rows, Unusable

# Of whole conversations, as message lists.
DIALOGUES = ("messages", "conversations")
SYSTEM = ("system", "system_prompt")
_CONTEXT = ("context", "ContextString")
# Column of a prompt, of what stands before it as in HarmBench, and of what follows it.
_PROMPTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("prompt", _CONTEXT, ()),
    ("question", _CONTEXT, ()),
    ("instruction", (), ("input", "context")),
    *((name, _CONTEXT, ()) for name in ("goal", "Goal", "behavior", "Behavior")),
    ("input", _CONTEXT, ()),
)
# Column of an answer.
ANSWERS = ("response", "answer", "completion", "output", "chosen")
PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
LABELLED = ("response_0", "response_1")
LABELS = ("is_response_0_safe", "is_response_1_safe")
IS_SAFE, LABEL = "is_safe", "label"
_COLUMNS = {*DIALOGUES, *SYSTEM, *ANSWERS, *LABELLED, *LABELS, IS_SAFE, LABEL}
_COLUMNS |= {name for pair in PAIRS for name in pair}
_COLUMNS |= {name for column, before, after in _PROMPTS for name in (column, *before, *after)}


PROMPT_NAMES = quoted(name for name, _, _ in _PROMPTS)

# HH-RLHF's text: turns that open with an empty line and a name.
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
# What chat templates open a conversation with, and what they end a prompt or an answer with.
_OPENS_TEMPLATE = re.compile(
    r"\s*(<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|\[gMASK\]|<｜begin▁of▁sentence｜>)?\s*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>|<\|turn>|<｜User｜>|\[INST\]"
    r"|<\|(system|user|assistant)\|>|<\|START_OF_TURN_TOKEN\|>|\[SYSTEM_PROMPT\]|<start_of_role>"
    r"|(A chat between|BEGINNING OF CONVERSATION:).*USER:|USER: .*ASSISTANT:)",
    re.DOTALL,
)
_ENDS_TEMPLATE = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|eot\|>|<\|end\|>|<end_of_turn>|<turn\|>|</s>|<eos>|\[/INST\]"
    r"|<\|endoftext\|>|<\|assistant\|>|<｜Assistant｜>|<｜end▁of▁sentence｜>"
    r"|\n(Assistant|ASSISTANT|AI):|### Response:)\s*\Z"
)
# Roles as ShareGPT names them.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_TOOL_ROLES = ("function_call", "observation")
_LISTED = re.compile(r"\s*\[\s*\{\s*['\"](role|content|name|from|value)['\"]")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptColumns:
    """Where a row's prompt is.

    Attributes:
        name: of the prompt's own column; None where whole dialogues have it in them.
        before: of columns with text that stands before it.
        after: of columns with text that follows it.
        system: of columns with a system message.
    """

    name: str | None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    system: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        """All names."""
        return {*self.before, *self.after, *self.system} | ({self.name} if self.name else set())


def known_rows(source: str, split: str, config: str | None) -> Rows:
    """Return the rows of a dataset, with the columns that conversations are read from.

    Raises:
        RecipeError: see ``dataset_rows``.
    """
    return dataset_rows(source, split, config, _COLUMNS)


def prompt_columns(found: Sequence[str]) -> PromptColumns:
    """Return where the prompt is among the columns that a dataset has."""
    system = tuple(name for name in SYSTEM if name in found)
    for name, *others in _PROMPTS:
        if name in found:
            before, after = (tuple(other for other in names if other in found) for names in others)
            return PromptColumns(name, before, after, system)
    return PromptColumns(None, system=system)


def dialogue_column(found: Sequence[str]) -> str | None:
    """Return the column of whole conversations among those that a dataset has, None without one."""
    return next((name for name in DIALOGUES if name in found), None)


def asked_columns(found: Sequence[str]) -> PromptColumns:
    """Return where the prompt is; without a column of its own, whole conversations have it."""
    columns = prompt_columns(found)
    return replace(columns, name=columns.name or dialogue_column(found))


def asked_of(row: dict[str, Any], columns: PromptColumns) -> list[Message]:
    """Return the messages of a prompt; what an assistant says at its end isn't part of it.

    Raises:
        Unusable: there is no prompt, or none that can be read.
    """
    messages = prompt_of(row, columns)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise Unusable("without a prompt")
    return messages


def prompt_of(row: dict[str, Any], columns: PromptColumns) -> list[Message]:
    """Return the messages of a row's prompt, opened by its system message.

    Without a column of prompts that is all there is of them.

    Raises:
        Unusable: there is no prompt, or none that can be read.
    """
    messages: list[Message] = []
    if columns.name:
        value = _unlisted(row[columns.name])
        if value is None or isinstance(value, str):
            text = _with_context(row, value or "", columns)
            if not text.strip():
                raise Unusable("without a prompt")
            messages = _turns(text) or user_prompt(_plain(text))
            if len(messages) > 1 and not messages[-1]["content"]:
                messages.pop()
        else:
            messages = messages_of(value)
    return _opened([row[name] for name in columns.system], messages)


def dialogue_of(prompt: Sequence[Message], value: Any) -> list[Message]:
    """Return the dialogue of a prompt and its answer, which ends with the assistant's.

    Args:
        prompt: of the answer; empty, or a system message alone, where ``value`` has it in it.
        value: text, messages that follow the prompt, or a dialogue that has the prompt in it, as
            messages or as HH-RLHF's text.

    Raises:
        Unusable: it is neither.
    """
    value = _unlisted(value)
    if isinstance(value, str):
        turns = _turns(value) or []
        if len(turns) < 2:
            if not value.strip():
                raise Unusable("without an answer")
            turns = [{"role": "assistant", "content": _plain(value)}]
    elif value is None:
        raise Unusable("without an answer")
    else:
        turns = messages_of(value)
    asked, said = ([m for m in part if m["role"] != "system"] for part in (prompt, turns))
    if said and said[0]["role"] == "assistant":
        whole = [*prompt, *turns]
    elif _has(said, asked):
        whole = _opened([m["content"] for m in prompt if m["role"] == "system"], turns)
    else:
        raise Unusable("whose dialogue does not have the prompt in it")
    if whole[-1]["role"] != "assistant":
        raise Unusable("not ending with an assistant's answer")
    if not any(message["role"] != "system" for message in whole[:-1]):
        raise Unusable("without a prompt")
    return whole


def messages_of(value: Any) -> list[Message]:
    """Return a list of chat messages: of each the role and the text.

    Args:
        value: a list of messages, one message, or a list of roles beside a list of texts, as
            ``datasets`` stores a sequence of structs.

    Raises:
        Unusable: it is none, or has in it what is no text.
    """
    value = _unlisted(value)
    if isinstance(value, dict):
        lists = all(isinstance(part, list) for part in value.values())
        parts = zip(*value.values(), strict=False) if lists else [value.values()]
        value = [dict(zip(value, part, strict=True)) for part in parts]
    if not isinstance(value, list) or not value:
        raise Unusable("unreadable")
    return [_message(message) for message in value]


def truth(value: Any) -> bool | None:
    """Return what a label says, which may be a number or text, as in a CSV; None for no label."""
    if isinstance(value, str):
        return _TRUTH.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise Unusable("unreadable")
    role, content = (
        message.get(name) if message.get(name) is not None else message.get(other)
        for name, other in (("role", "from"), ("content", "value"))
    )
    if message.get("tool_calls") or role in _TOOL_ROLES:
        raise Unusable("with a tool call")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise Unusable("with a message that is not text")
        content = "".join(part["text"] for part in parts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable("unreadable")
    return {"role": _whole(_ROLES.get(role, role)), "content": _whole(content)}


def _with_context(row: dict[str, Any], text: str, columns: PromptColumns) -> str:
    """Return the text of a prompt with what stands before and after it in other columns."""

    def texts(names: Sequence[str]) -> list[str]:
        values = (row[name] for name in names)
        return [v for v in values if isinstance(v, str) and v.strip() and v not in text]

    following = "\n".join([*([text] if text.strip() else []), *texts(columns.after)])
    # HarmBench's own way.
    return "\n\n---\n\n".join([*texts(columns.before), following])


def _opened(system: Sequence[Any], messages: list[Message]) -> list[Message]:
    """Return messages that open with the first of the system texts, where they have none."""
    texts = [text for text in system if isinstance(text, str) and text.strip()]
    if not texts or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": _plain(texts[0])}, *messages]


def _has(said: Sequence[Message], asked: Sequence[Message]) -> bool:
    """Return whether a dialogue begins with a prompt, or has the only message of one in it."""
    one, other = ([(m["role"], m["content"].strip()) for m in part] for part in (asked, said))
    return other[: len(one)] == one or (len(one) == 1 and one[0] in other)


def _unlisted(value: Any) -> Any:
    """Return the messages that a JSON text lists, as in a CSV; any other value as it is."""
    if not isinstance(value, str) or not _LISTED.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Unusable("with a message list written as text that is not JSON") from None


def _turns(text: str) -> list[Message] | None:
    """Return the turns of HH-RLHF's text, None for other text."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return None
    return [
        {"role": _TURN_ROLES[name], "content": _plain(content.strip())}
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _plain(text: str) -> str:
    """Return a text, which no chat template was put around yet.

    Raises:
        Unusable: one was: it would get another one around it.
    """
    if _OPENS_TEMPLATE.match(text) or _ENDS_TEMPLATE.search(text):
        raise Unusable("already in a chat template")
    return _whole(text)


def _whole(text: str) -> str:
    """Return a text that a tokenizer takes.

    Raises:
        Unusable: it has halves of signs in it.
    """
    if _SURROGATE.search(text):
        raise Unusable("with text that is not Unicode")
    return text
