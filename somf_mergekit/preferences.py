"""Safety datasets to preference pairs, and pairs to tokens."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .dialogue import AS_GIVEN, Cut, Message, encoded, user_prompt
from .errors import RecipeError
from .rendering import Rendering
from .rows import Dropped, Examples, examples_of

KNOWN_COLUMNS = (
    "'prompt', 'chosen', 'rejected' (text or message lists); "
    "'chosen', 'rejected' (whole dialogues with the same beginning); or "
    "'prompt', 'response_0', 'response_1', 'is_response_0_safe', 'is_response_1_safe'"
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """One prompt with its safe (``chosen``) and its unsafe (``rejected``) answer.

    ``row`` is the dataset's that it is from, counted from 0.
    """

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    row: int = field(default=0, compare=False)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair; prompt plus either answer has at most ``max_length`` of them.

    Where safe answers alone are learned from, ``rejected`` is empty. ``row`` is the dataset's that
    it is from, counted from 0; ``cut`` says what was taken.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int = field(default=0, compare=False)
    cut: Cut = field(default_factory=Cut, compare=False)


def preference_pairs(rows: Any, source: str) -> tuple[Examples[Pair], Dropped]:
    """Return the usable pairs of ``rows`` in their order, and how many were dropped and why.

    Raises:
        RecipeError: the columns are not recognised, there is no usable pair, or chosen equals
            rejected throughout.
    """
    reader = _reader(list(rows.column_names), source)

    def read(number: int, row: dict[str, Any]) -> Pair | str:
        found: Pair | str = reader(row)
        if isinstance(found, str):
            return found
        if not found.chosen.strip() or not found.rejected.strip():
            return "without an answer"
        if found.chosen == found.rejected:
            return "with chosen equal to rejected"
        return replace(found, row=number)

    pairs, dropped = examples_of(rows, read)
    if not pairs:
        raise RecipeError(f"dataset {source} has no usable preference pair{dropped.why_none}")
    return pairs, dropped


def encoded_pairs(
    pairs: Iterable[Pair],
    tokenizer: Any,
    max_length: int,
    source: str,
    enough: int | None = None,
    how: Rendering = AS_GIVEN,
) -> tuple[list[EncodedPair], Dropped]:
    """Tokenise pairs with the chat template and cut them to ``max_length`` tokens.

    Args:
        pairs: the first ``enough`` usable ones are taken, all where that is not given.
        tokenizer: with or without a chat template.
        max_length: tokens of a prompt with an answer.
        source: of the pairs, for messages.
        enough: see ``pairs``.
        how: the chat template is rendered.

    Raises:
        RecipeError: no pair is left with two different answers.
    """
    kept: list[EncodedPair] = []
    dropped = Dropped()
    for pair in pairs:
        if len(kept) == enough:
            break
        answers = (pair.chosen, pair.rejected)
        found = encoded(tokenizer, pair.messages, answers, max_length, how)
        prompt, (chosen, rejected) = found.prompt, found.answers
        if not prompt and found.cut.prompt:
            dropped.add(f"whose last question has no room in {max_length} tokens")
        elif not prompt or not chosen or not rejected:
            dropped.add("without an answer after tokenisation")
        elif chosen == rejected:
            dropped.add(f"with equal answers in the first {max_length} tokens")
        else:
            kept.append(EncodedPair(prompt, chosen, rejected, pair.row, found.cut))
    if not kept:
        raise RecipeError(
            f"dataset {source}: no pair is usable after tokenisation ({dropped}); "
            "raise max_length or use other data"
        )
    return kept, dropped


def _reader(columns: list[str], source: str) -> Any:
    have = set(columns)
    if {"prompt", "chosen", "rejected"} <= have:
        return _explicit_pair
    if {"chosen", "rejected"} <= have:
        return _dialogue_pair
    if {
        "prompt",
        "response_0",
        "response_1",
        "is_response_0_safe",
        "is_response_1_safe",
    } <= have:
        return _labelled_pair
    raise RecipeError(
        f"dataset {source}: columns not recognised. Found: {', '.join(columns) or '(none)'}. "
        f"Expected {KNOWN_COLUMNS}."
    )


def _explicit_pair(row: dict[str, Any]) -> Pair | str:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        messages: list[Message] | None = user_prompt(prompt) if prompt.strip() else None
    else:
        messages = read_messages(prompt)
    answers = [answer_text(row[key]) for key in ("chosen", "rejected")]
    if not messages or answers[0] is None or answers[1] is None:
        return "unreadable"
    return _pair(messages, answers[0], answers[1])


def _dialogue_pair(row: dict[str, Any]) -> Pair | str:
    one, two = (
        _turns(row[key]) if isinstance(row[key], str) else read_messages(row[key])
        for key in ("chosen", "rejected")
    )
    if not one or not two:
        return "unreadable"
    (*beginning, chosen), (*other, rejected) = one, two
    if not beginning or beginning != other:
        return "without a shared beginning"
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        return "not ending with an assistant's answer"
    return _pair(beginning, chosen["content"], rejected["content"])


def _labelled_pair(row: dict[str, Any]) -> Pair | str:
    prompt, answers = row["prompt"], (row["response_0"], row["response_1"])
    safe = (row["is_response_0_safe"], row["is_response_1_safe"])
    if not isinstance(prompt, str) or not prompt.strip():
        return "unreadable"
    if not all(isinstance(answer, str) for answer in answers):
        return "unreadable"
    if bool(safe[0]) == bool(safe[1]):
        return "without exactly one safe answer"
    chosen, rejected = answers if safe[0] else answers[::-1]
    return _pair(user_prompt(prompt), chosen, rejected)


def _pair(messages: list[Message], chosen: str, rejected: str) -> Pair:
    return Pair(tuple((m["role"], m["content"]) for m in messages), chosen, rejected)


def read_messages(value: Any) -> list[Message] | None:
    """Return a list of chat messages, None where ``value`` is none."""
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict):
            return None
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return None
    return [{"role": m["role"], "content": m["content"]} for m in value]


def answer_text(value: Any) -> str | None:
    """Return an answer given as text or as messages, None where it is neither."""
    if isinstance(value, str):
        return value
    messages = read_messages(value)
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None


def _turns(text: str) -> list[Message] | None:
    """Split HH-RLHF text: turns that open with an empty line and ``Human:`` or ``Assistant:``."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return None
    return [
        {"role": _TURN_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
