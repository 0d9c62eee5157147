"""Safety datasets to preference pairs, and pairs to tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.errors import RecipeError
from .chat import AS_GIVEN, Cut, Message, encoded
from .conversations import (
    LABELLED,
    PAIR,
    PROMPT_NAMES,
    PromptColumns,
    dialogue_of,
    known_rows,
    prompt_columns,
    prompt_of,
    truth,
)
from .rendering import Rendering
from .rows import Dropped, Examples, Rows, Unusable, examples_of

KNOWN_COLUMNS = (
    "'chosen' and 'rejected' (text or message lists) beside a prompt "
    f"({PROMPT_NAMES}), or as whole dialogues with the same beginning; or a prompt with "
    + ", ".join(f"'{name}'" for name in LABELLED)
)


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


def read_pairs(source: str, split: str = "train", config: str | None = None) -> Examples[Pair]:
    """Return the preference pairs of a dataset, as a mask learns from them.

    Args:
        source: a hub id, a file or a folder.
        split: its name, or a part of it such as ``train[:10]``.
        config: name of a configuration (subset) of the dataset.

    Returns:
        The usable pairs in their order; ``left_out`` counts the other rows by reason, and
        ``unused`` names the columns that nothing was read from.

    Raises:
        RecipeError: the dataset can't be read, its columns are not recognised, or there is no
            usable pair.
    """
    return preference_pairs(known_rows(source, split, config), source)


def preference_pairs(rows: Rows, source: str) -> Examples[Pair]:
    """Return the usable pairs of ``rows`` in their order.

    Raises:
        RecipeError: the columns are not recognised, or there is no usable pair.
    """
    found = rows.column_names
    columns = prompt_columns(found)
    if set(PAIR) <= set(found):
        reader, used = _chosen_pair, columns.used.union(PAIR)
    elif columns.name and set(LABELLED) <= set(found):
        reader, used = _labelled_pair, columns.used.union(LABELLED)
    else:
        raise RecipeError(
            f"dataset {source}: columns not recognised. Found: {', '.join(found) or '(none)'}. "
            f"Expected {KNOWN_COLUMNS}."
        )

    def read(number: int, row: dict[str, Any]) -> Pair:
        pair = reader(row, columns)
        if not pair.chosen.strip() or not pair.rejected.strip():
            raise Unusable("without an answer")
        if pair.chosen == pair.rejected:
            raise Unusable("with chosen equal to rejected")
        return replace(pair, row=number)

    pairs = examples_of(rows, read, used)
    if not pairs:
        raise RecipeError(
            f"dataset {source} has no usable preference pair{pairs.left_out.why_none}. "
            f"Columns found: {', '.join(found)}. Expected {KNOWN_COLUMNS}."
        )
    return pairs


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


def _chosen_pair(row: dict[str, Any], columns: PromptColumns) -> Pair:
    prompt = prompt_of(row, columns)
    return _pair(*(dialogue_of(prompt, row[name]) for name in PAIR))


def _labelled_pair(row: dict[str, Any], columns: PromptColumns) -> Pair:
    prompt = prompt_of(row, columns)
    safe = [truth(row[name]) for name in LABELLED[2:]]
    if None in safe:
        raise Unusable("without a label for each answer")
    if safe[0] == safe[1]:
        raise Unusable("without exactly one safe answer")
    one, two = (dialogue_of(prompt, row[name]) for name in LABELLED[:2])
    return _pair(one, two) if safe[0] else _pair(two, one)


def _pair(chosen: list[Message], rejected: list[Message]) -> Pair:
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("without a shared beginning")
    prompt = tuple((m["role"], m["content"]) for m in chosen[:-1])
    return Pair(prompt, chosen[-1]["content"], rejected[-1]["content"])
