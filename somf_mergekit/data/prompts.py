"""Prompts, alone or with one answer each: for the utility term, for ``sft``, to be measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.errors import RecipeError
from .chat import AS_GIVEN, Cut, Message, encoded
from .conversations import (
    ANSWERS,
    DIALOGUE,
    IS_SAFE,
    LABEL,
    PROMPT_NAMES,
    SYSTEM,
    dialogue_of,
    known_rows,
    prompt_columns,
    prompt_of,
    truth,
)
from .rendering import Rendering
from .rows import Dropped, Examples, Rows, Unusable, examples_of, unused_columns

_ANSWER_NAMES = ", ".join(f"'{name}'" for name in ANSWERS)
KNOWN_ANSWERS = (
    f"a prompt ({PROMPT_NAMES}) with an answer ({_ANSWER_NAMES}); or '{DIALOGUE}', a message list "
    f"that ends with the assistant's answer. Of '{IS_SAFE}', and of '{LABEL}' beside 'completion' "
    f"or '{DIALOGUE}', the true ones are used"
)
KNOWN_PROMPTS = f"{PROMPT_NAMES} (text or message lists), or '{DIALOGUE}'"


@dataclass(frozen=True)
class EncodedAnswer:
    """Token ids of a prompt and its answer, ``max_length`` of them at most.

    ``row`` is the dataset's that they are from, counted from 0; ``cut`` says what was taken.
    """

    prompt: list[int]
    answer: list[int]
    row: int = field(default=0, compare=False)
    cut: Cut = field(default_factory=Cut, compare=False)


def read_answers(
    source: str, split: str = "train", config: str | None = None
) -> Examples[tuple[list[Message], str]]:
    """Return the prompts of a dataset with one answer each, as a utility term learns from them.

    Args:
        source: a hub id, a file or a folder.
        split: its name, or a part of it such as ``train[:10]``.
        config: name of a configuration (subset) of the dataset.

    Returns:
        Messages with their answers, in their order; ``left_out`` counts the other rows by reason,
        and ``unused`` names the columns that nothing was read from.

    Raises:
        RecipeError: the dataset can't be read, its columns are not recognised, or no prompt has an
            answer.
    """
    return answered_prompts(known_rows(source, split, config), source)


def read_prompts(
    source: str, split: str = "train", config: str | None = None
) -> Examples[list[Message]]:
    """Return the different prompts of a dataset, as models are asked them.

    Args:
        source: a hub id, a file or a folder.
        split: its name, or a part of it such as ``train[:10]``.
        config: name of a configuration (subset) of the dataset.

    Returns:
        The messages of each, in their order; ``left_out`` counts the other rows by reason, and
        ``unused`` names the columns that nothing was read from.

    Raises:
        RecipeError: the dataset can't be read, its columns are not recognised, or there is no
            prompt.
    """
    return prompts_alone(known_rows(source, split, config), source)


def has_answers(columns: Sequence[str]) -> bool:
    """Return whether prompts and answers are found among a dataset's columns."""
    return DIALOGUE in columns or _answer_column(columns) is not None


def answered_prompts(rows: Rows, source: str) -> Examples[tuple[list[Message], str]]:
    """Return the prompts of ``rows`` with their answers.

    Rows whose ``is_safe`` is false are left out, and unwanted completions (KTO's ``label``).

    Raises:
        RecipeError: the columns are not recognised, or no prompt has an answer.
    """
    found = rows.column_names
    if not has_answers(found):
        raise RecipeError(
            f"dataset {source}: prompts with answers not found. "
            f"Found: {', '.join(found) or '(no columns)'}. Expected {KNOWN_ANSWERS}."
        )
    answer = _answer_column(found)
    columns = prompt_columns(found if answer else [name for name in found if name in SYSTEM])
    answer = answer or DIALOGUE
    labels = [IS_SAFE, LABEL] if answer in (DIALOGUE, "completion") else [IS_SAFE]
    labels = [name for name in labels if name in found]

    def read(_: int, row: dict[str, Any]) -> tuple[list[Message], str]:
        for name in labels:
            said = truth(row[name])
            if said is None:
                raise Unusable(f"with neither true nor false for {name}")
            if not said:
                raise Unusable("not safe" if name == IS_SAFE else "not wanted")
        dialogue = dialogue_of(prompt_of(row, columns), row[answer])
        if not dialogue[-1]["content"].strip():
            raise Unusable("without an answer")
        return dialogue[:-1], dialogue[-1]["content"]

    examples = examples_of(rows, read, {*columns.used, answer, *labels})
    if not examples:
        raise RecipeError(
            f"dataset {source} has no prompt with an answer{examples.left_out.why_none}"
        )
    return examples


def prompts_alone(rows: Rows, source: str) -> Examples[list[Message]]:
    """Return the different prompts of ``rows`` in their order.

    What an assistant says at the end of a dialogue is no part of its prompt.

    Raises:
        RecipeError: the columns are not recognised, or there is no prompt.
    """
    columns = prompt_columns(rows.column_names)
    if not columns.name and DIALOGUE not in rows.column_names:
        raise RecipeError(
            f"dataset {source}: prompts not found. "
            f"Found: {', '.join(rows.column_names) or '(no columns)'}. Expected {KNOWN_PROMPTS}."
        )
    if not columns.name:
        columns = replace(columns, name=DIALOGUE)
    found: dict[tuple[tuple[str, str], ...], list[Message]] = {}
    dropped = Dropped()
    for row in rows:
        try:
            messages = prompt_of(row, columns)
        except Unusable as why:
            dropped.add(str(why))
            continue
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        key = tuple((m["role"], m["content"]) for m in messages)
        if not messages:
            dropped.add("without a prompt")
        elif key in found:
            dropped.add("repeated")
        else:
            found[key] = messages
    if not found:
        raise RecipeError(f"dataset {source} has no prompt{dropped.why_none}")
    prompts = list(found.values())
    unused = unused_columns(rows, columns.used)
    return Examples(prompts, range(len(prompts)), lambda _, found: found, dropped, unused)


def encoded_answers(
    examples: Sequence[tuple[list[Message], str]],
    tokenizer: Any,
    max_length: int,
    source: str,
    enough: int | None = None,
    how: Rendering = AS_GIVEN,
) -> tuple[list[EncodedAnswer], Dropped]:
    """Tokenise prompts and answers with the chat template and cut them to ``max_length`` tokens.

    Args:
        examples: the first ``enough`` usable ones are taken, all where that is not given.
        tokenizer: with or without a chat template.
        max_length: tokens of a prompt with its answer.
        source: of the examples, for messages.
        enough: see ``examples``.
        how: the chat template is rendered.

    Returns:
        The encoded examples, and how many were left out by reason.

    Raises:
        RecipeError: nothing is left of any answer.
    """
    kept: list[EncodedAnswer] = []
    dropped = Dropped()
    # Of other sequences the places stand for the rows.
    numbers = examples.numbers if isinstance(examples, Examples) else range(len(examples))
    for number, (messages, text) in zip(numbers, examples, strict=True):
        if len(kept) == enough:
            break
        found = encoded(tokenizer, messages, [text], max_length, how)
        (answer,) = found.answers
        if not found.prompt and found.cut.prompt:
            dropped.add(f"whose last question has no room in {max_length} tokens")
        elif not found.prompt or not answer:
            dropped.add("without an answer after tokenisation")
        else:
            kept.append(EncodedAnswer(found.prompt, answer, number, found.cut))
    if not kept:
        raise RecipeError(f"dataset {source}: no answer is usable after tokenisation ({dropped})")
    return kept, dropped


def _answer_column(columns: Sequence[str]) -> str | None:
    """Return the column of the answers, None where there is none or no prompt beside them."""
    if not prompt_columns(columns).name:
        return None
    return next((name for name in ANSWERS if name in columns), None)
