"""Safety datasets to preference pairs, and pairs to tokens."""

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .dialogue import Message, answer_ids, cut_to_length, prompt_ids, user_prompt
from .errors import RecipeError

FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
KNOWN_COLUMNS = (
    "'prompt', 'chosen', 'rejected' (text or message lists); "
    "'chosen', 'rejected' (whole dialogues with the same beginning); or "
    "'prompt', 'response_0', 'response_1', 'is_response_0_safe', 'is_response_1_safe'"
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """One prompt with its safe (``chosen``) and its unsafe (``rejected``) answer."""

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair; prompt plus either answer has at most ``max_length`` of them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class Dropped:
    """How many rows gave no pair, by reason."""

    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count one dropped row."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


def dataset_rows(source: str, split: str = "train", config: str | None = None) -> Any:
    """Return the rows of a hub dataset, a file (.jsonl, .json, .csv, .parquet) or a folder.

    Raises:
        RecipeError: there is no such file, folder, split or hub dataset, or it can't be read.
    """
    import datasets

    path = os.path.expanduser(source)
    try:
        if os.path.isfile(path):
            extension = os.path.splitext(path)[1].lower()
            if extension not in FILE_FORMATS:
                raise RecipeError(
                    f"dataset file {source}: unknown kind {extension or '(no extension)'}; "
                    f"known are {', '.join(FILE_FORMATS)}"
                )
            return datasets.load_dataset(FILE_FORMATS[extension], data_files=path, split="train")
        if os.path.isdir(path):
            if os.path.exists(os.path.join(path, "state.json")):
                return datasets.load_from_disk(path)
            return datasets.load_dataset(path, name=config, split=split)
        if _looks_like_path(source):
            raise RecipeError(f"dataset {source}: no such file or folder")
        return datasets.load_dataset(source, name=config, split=split)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"dataset {source} (split {split}) can't be read: {_first_line(error)}. Expected a hub "
            f"id, a folder, or a file of {', '.join(FILE_FORMATS)}."
        ) from error


def preference_pairs(rows: Any, source: str) -> tuple[list[Pair], Dropped]:
    """Return the usable pairs of ``rows`` in their order, and how many were dropped and why.

    Raises:
        RecipeError: the columns are not recognised, there is no usable pair, or chosen equals
            rejected throughout.
    """
    read = _reader(list(rows.column_names), source)
    pairs, dropped = [], Dropped()
    for row in rows:
        found = read(row)
        if isinstance(found, str):
            dropped.add(found)
        elif not found.chosen.strip() or not found.rejected.strip():
            dropped.add("without an answer")
        elif found.chosen == found.rejected:
            dropped.add("with chosen equal to rejected")
        else:
            pairs.append(found)
    if not pairs:
        why = f": {dropped}" if dropped.reasons else ": it has no rows"
        raise RecipeError(f"dataset {source} has no usable preference pair{why}")
    return pairs, dropped


def sampled_pairs(pairs: Sequence[Pair], count: int | None, seed: int) -> list[Pair]:
    """Return ``count`` of ``pairs`` (all for None) in an order drawn from ``seed``."""
    order = list(pairs)
    random.Random(seed).shuffle(order)
    return order if count is None else order[:count]


def encoded_pairs(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int, source: str
) -> tuple[list[EncodedPair], Dropped]:
    """Tokenise pairs with the chat template and cut them to ``max_length`` tokens.

    Raises:
        RecipeError: no pair is left with two different answers.
    """
    encoded, dropped = [], Dropped()
    for pair in pairs:
        messages = pair.messages
        prompt, (chosen, rejected) = cut_to_length(
            prompt_ids(tokenizer, messages),
            [answer_ids(tokenizer, messages, text) for text in (pair.chosen, pair.rejected)],
            max_length,
        )
        if not prompt or not chosen or not rejected:
            dropped.add("without an answer after tokenisation")
        elif chosen == rejected:
            dropped.add(f"with equal answers in the first {max_length} tokens")
        else:
            encoded.append(EncodedPair(prompt, chosen, rejected))
    if not encoded:
        raise RecipeError(
            f"dataset {source}: no pair is usable after tokenisation ({dropped}); "
            "raise max_length or use other data"
        )
    return encoded, dropped


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
        messages = _messages(prompt)
    answers = [_answer_text(row[key]) for key in ("chosen", "rejected")]
    if not messages or answers[0] is None or answers[1] is None:
        return "unreadable"
    return _pair(messages, answers[0], answers[1])


def _dialogue_pair(row: dict[str, Any]) -> Pair | str:
    one, two = (
        _turns(row[key]) if isinstance(row[key], str) else _messages(row[key])
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


def _messages(value: Any) -> list[Message] | None:
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict):
            return None
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return None
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _answer_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    messages = _messages(value)
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


def _looks_like_path(source: str) -> bool:
    extension = os.path.splitext(source)[1].lower()
    return extension in FILE_FORMATS or source[:1] in "./~" or source.count("/") > 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def rows_of_prompts(rows: Any, source: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """Yield the named text columns of each row.

    Raises:
        RecipeError: a column is missing, or a value is not text.
    """
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise RecipeError(
            f"dataset {source}: column {', '.join(missing)} missing. "
            f"Found: {', '.join(rows.column_names)}."
        )
    for number, row in enumerate(rows):
        values = tuple(row[column] for column in columns)
        if not all(isinstance(value, str) for value in values):
            raise RecipeError(f"dataset {source}: row {number} has no text in {columns}")
        yield values
