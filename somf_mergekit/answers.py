"""Prompts, alone or with one answer each: for the utility term, for ``sft``, to be measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .dialogue import AS_GIVEN, Cut, Message, encoded, user_prompt
from .errors import RecipeError
from .preferences import answer_text, read_messages
from .rendering import Rendering
from .rows import Dropped, Examples, examples_of

# Column of the prompt, of its answer, and of what may follow the prompt.
_COLUMNS = (
    ("prompt", "response", ()),
    ("prompt", "answer", ()),
    ("prompt", "completion", ()),
    ("prompt", "chosen", ()),
    ("question", "answer", ()),
    ("instruction", "output", ("input",)),
    ("instruction", "response", ("context",)),
)
_DIALOGUE = "messages"
_SAFE = "is_safe"
KNOWN_ANSWERS = (
    "; ".join(f"'{prompt}' with '{answer}'" for prompt, answer, _ in _COLUMNS)
    + f"; or '{_DIALOGUE}', a message list that ends with the assistant's answer. A column "
    f"'{_SAFE}' tells which answers are safe"
)
# Column of a prompt that needs no answer, and of what may follow it: those above, and those of
# lists of harmful requests.
_PROMPTS = (
    ("prompt", ()),
    ("question", ()),
    ("instruction", ("input", "context")),
    *((name, ()) for name in ("goal", "Goal", "behavior", "Behavior")),
)
KNOWN_PROMPTS = (
    ", ".join(f"'{name}'" for name, _ in _PROMPTS) + f" (text or message lists), or '{_DIALOGUE}'"
)


@dataclass(frozen=True)
class EncodedAnswer:
    """Token ids of a prompt and its answer, ``max_length`` of them at most.

    ``row`` is the dataset's that they are from, counted from 0; ``cut`` says what was taken.
    """

    prompt: list[int]
    answer: list[int]
    row: int = field(default=0, compare=False)
    cut: Cut = field(default_factory=Cut, compare=False)


def has_answers(columns: Sequence[str]) -> bool:
    """Return whether prompts and answers are found among a dataset's columns."""
    return _columns_of(columns) is not None or _DIALOGUE in columns


def answered_prompts(rows: Any, source: str) -> tuple[Examples[tuple[list[Message], str]], Dropped]:
    """Return the prompts of ``rows`` with their answers, and how many were dropped and why.

    Rows whose ``is_safe`` is false are dropped.

    Raises:
        RecipeError: the columns are not recognised, or no prompt has an answer.
    """
    columns = _columns_of(rows.column_names)
    if columns is None and _DIALOGUE not in rows.column_names:
        raise RecipeError(
            f"dataset {source}: prompts with answers not found. "
            f"Found: {', '.join(rows.column_names) or '(no columns)'}. Expected {KNOWN_ANSWERS}."
        )

    def read(_: int, row: dict[str, Any]) -> tuple[list[Message], str] | str:
        if _SAFE in row and not row[_SAFE]:
            return "not safe"
        messages, answer = _dialogue(row) if columns is None else _columns(row, columns)
        if not messages:
            return "unreadable"
        if answer is None or not answer.strip():
            return "without an answer"
        return messages, answer

    found, dropped = examples_of(rows, read)
    if not found:
        raise RecipeError(f"dataset {source} has no prompt with an answer{dropped.why_none}")
    return found, dropped


def prompts_alone(rows: Any, source: str) -> tuple[list[list[Message]], Dropped]:
    """Return the different prompts of ``rows`` in their order, and how many were dropped and why.

    What an assistant says at the end of a dialogue is no part of its prompt.

    Raises:
        RecipeError: the columns are not recognised, or there is no prompt.
    """
    columns = next((c for c in _PROMPTS if c[0] in rows.column_names), None)
    if columns is None and _DIALOGUE not in rows.column_names:
        raise RecipeError(
            f"dataset {source}: prompts not found. "
            f"Found: {', '.join(rows.column_names) or '(no columns)'}. Expected {KNOWN_PROMPTS}."
        )
    found: dict[tuple[tuple[str, str], ...], list[Message]] = {}
    dropped = Dropped()
    for row in rows:
        messages = _prompt(row, *columns) if columns else read_messages(row[_DIALOGUE])
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        key = tuple((m["role"], m["content"]) for m in messages or ())
        if not messages:
            dropped.add("unreadable")
        elif key in found:
            dropped.add("repeated")
        else:
            found[key] = messages
    if not found:
        raise RecipeError(f"dataset {source} has no prompt{dropped.why_none}")
    return list(found.values()), dropped


def encoded_answers(
    examples: Sequence[tuple[list[Message], str]],
    tokenizer: Any,
    max_length: int,
    source: str,
    enough: int | None = None,
    how: Rendering = AS_GIVEN,
) -> list[EncodedAnswer]:
    """Tokenise prompts and answers with the chat template and cut them to ``max_length`` tokens.

    Args:
        examples: the first ``enough`` usable ones are taken, all where that is not given.
        tokenizer: with or without a chat template.
        max_length: tokens of a prompt with its answer.
        source: of the examples, for messages.
        enough: see ``examples``.
        how: the chat template is rendered.

    Raises:
        RecipeError: nothing is left of any answer.
    """
    kept: list[EncodedAnswer] = []
    # Of other sequences the places stand for the rows.
    numbers = examples.numbers if isinstance(examples, Examples) else range(len(examples))
    for number, (messages, text) in zip(numbers, examples, strict=True):
        if len(kept) == enough:
            break
        found = encoded(tokenizer, messages, [text], max_length, how)
        (answer,) = found.answers
        if found.prompt and answer:
            kept.append(EncodedAnswer(found.prompt, answer, number, found.cut))
    if not kept:
        raise RecipeError(f"dataset {source}: no answer has a token the tokenizer knows")
    return kept


def _columns_of(columns: Sequence[str]) -> tuple[str, str, tuple[str, ...]] | None:
    return next((c for c in _COLUMNS if c[0] in columns and c[1] in columns), None)


def _columns(
    row: dict[str, Any], columns: tuple[str, str, tuple[str, ...]]
) -> tuple[list[Message] | None, str | None]:
    prompt, answer, further = columns
    return _prompt(row, prompt, further), answer_text(row[answer])


def _prompt(row: dict[str, Any], column: str, further: tuple[str, ...]) -> list[Message] | None:
    prompt = row[column]
    if not isinstance(prompt, str):
        return read_messages(prompt)
    texts = [prompt, *(row.get(name) for name in further)]
    whole = "\n".join(text for text in texts if isinstance(text, str) and text.strip())
    return user_prompt(whole) if whole.strip() else None


def _dialogue(row: dict[str, Any]) -> tuple[list[Message] | None, str | None]:
    messages = read_messages(row[_DIALOGUE])
    if not messages or messages[-1]["role"] != "assistant":
        return None, None
    return messages[:-1], messages[-1]["content"]
