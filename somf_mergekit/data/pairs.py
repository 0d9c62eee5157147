"""Preference pairs, prompts with answers and prompts alone: what the rows of a dataset give."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..common.digests import json_digest
from ..common.errors import RecipeError, quoted
from .answering import Answering
from .chat import Message
from .conversations import (
    ANSWERS,
    DIALOGUES,
    IS_SAFE,
    LABEL,
    LABELLED,
    LABELS,
    PAIRS,
    PROMPT_NAMES,
    asked_columns,
    asked_of,
    dialogue_column,
    dialogue_of,
    known_rows,
    prompt_columns,
    prompt_of,
    truth,
)
from .rows import Dropped, Examples, Rows, Unusable, examples_of

KNOWN_PAIRS = (
    "'chosen' and 'rejected' (text or message lists; or 'chosen_response' and 'rejected_response') "
    f"beside a prompt ({PROMPT_NAMES}, or {quoted(DIALOGUES)}), or as whole dialogues with the "
    f"same beginning; a prompt with {quoted((*LABELLED, *LABELS))}; or equal prompts with answers "
    f"of both kinds, by '{IS_SAFE}' or by '{LABEL}' beside 'completion'"
)
KNOWN_ANSWERS = (
    f"a prompt ({PROMPT_NAMES}) with an answer ({quoted(ANSWERS)}); or {quoted(DIALOGUES)}, a "
    f"message list that ends with the assistant's answer. Of '{IS_SAFE}', and of '{LABEL}' beside "
    "'completion' or a message list, the true ones are used"
)
KNOWN_PROMPTS = f"{PROMPT_NAMES} (text or message lists), or {quoted(DIALOGUES)}"
# Of one prompt, where labelled answers are paired.
MOST_OF_A_PROMPT = 16


@dataclass(frozen=True)
class Pair:
    """One prompt with its safe (``chosen``) and its unsafe (``rejected``) answer.

    Of a prompt with one answer, ``rejected`` is empty. ``row`` is the dataset's that it is from,
    counted from 0; of two rows, that of the safe answer.
    """

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    row: int = field(default=0, compare=False)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


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


def read_answers(
    source: str, split: str = "train", config: str | None = None
) -> Examples[tuple[list[Message], str]]:
    """Return the prompts of a dataset with one answer each, as a utility term learns from them.

    They are messages with their answers. All else is as in ``read_pairs``.
    """
    return answered_prompts(known_rows(source, split, config), source)


def read_prompts(
    source: str, split: str = "train", config: str | None = None
) -> Examples[list[Message]]:
    """Return the different prompts of a dataset, as models are asked them.

    They are messages. All else is as in ``read_pairs``.
    """
    return prompts_alone(known_rows(source, split, config), source)


def preference_pairs(rows: Rows, source: str) -> Examples[Pair]:
    """Return the usable pairs of ``rows`` in their order.

    Raises:
        RecipeError: the columns are not recognised, or there is no usable pair.
    """
    found = rows.column_names
    columns = prompt_columns(found)
    pair = next((names for names in PAIRS if set(names) <= set(found)), None)
    labels = () if pair else LABELS
    used = (*(pair or LABELLED), *labels)
    if pair and not columns.name and dialogue_column(found):
        columns = asked_columns(found)
    if labels and not (columns.name and set(used) <= set(found)):
        answering = Answering.of(found)
        if answering and answering.labels:
            return _with_a_pair(_labelled_pairs(rows, answering), source, found)
        raise RecipeError(
            f"dataset {source}: columns not recognised. {_expected(found, KNOWN_PAIRS)}"
            f"{_nearest(found)}"
        )
    prompted = asked_of if columns.name in DIALOGUES else prompt_of

    def read(number: int, row: dict[str, Any]) -> Pair:
        prompt = prompted(row, columns)
        is_safe = [truth(row[name]) for name in labels]
        if None in is_safe:
            raise Unusable("without a label for each answer")
        if labels and is_safe[0] == is_safe[1]:
            raise Unusable("without exactly one safe answer")
        chosen, rejected = (dialogue_of(prompt, row[name]) for name in used[:2])
        if is_safe == [False, True]:
            chosen, rejected = rejected, chosen
        if chosen[:-1] != rejected[:-1]:
            raise Unusable("without a shared beginning")
        answers = chosen[-1]["content"], rejected[-1]["content"]
        if not all(map(str.strip, answers)):
            raise Unusable("without an answer")
        if answers[0] == answers[1]:
            raise Unusable("with chosen equal to rejected")
        return Pair(_role_texts(chosen[:-1]), *answers, number)

    return _with_a_pair(examples_of(rows, read, columns.used.union(used)), source, found)


def has_answers(columns: Sequence[str]) -> bool:
    """Return whether prompts and answers are found among a dataset's columns."""
    return Answering.of(columns) is not None


def answered_prompts(rows: Rows, source: str) -> Examples[tuple[list[Message], str]]:
    """Return the prompts of ``rows`` with their answers.

    Rows whose ``is_safe`` is false are left out, and unwanted completions (KTO's ``label``).

    Raises:
        RecipeError: the columns are not recognised, or no prompt has an answer.
    """
    found = rows.column_names
    answering = Answering.of(found)
    if answering is None:
        raise RecipeError(
            f"dataset {source}: prompts with answers not found. {_expected(found, KNOWN_ANSWERS)}"
        )

    def read(_: int, row: dict[str, Any]) -> tuple[list[Message], str]:
        unwanted = answering.unwanted(row)
        if unwanted:
            raise Unusable(unwanted)
        return answering.read(row)

    examples = examples_of(rows, read, answering.used)
    if not examples:
        raise RecipeError(
            f"dataset {source} has no prompt with an answer{examples.left_out.why_none}"
        )
    return examples


def _labelled_pairs(rows: Rows, answering: Answering) -> Examples[Pair]:
    """Return pairs of a wanted and an unwanted answer to the same prompt.

    Of each prompt they are MOST_OF_A_PROMPT at most, of as many different answers as can be.
    """
    dropped = Dropped()
    # Of a prompt: rows with their answers' hashes, the wanted ones, then the others.
    groups: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for number, row in enumerate(rows):
        try:
            prompt, answer = answering.read(row)
            is_unwanted = answering.unwanted(row) is not None
        except Unusable as why:
            dropped.add(str(why))
            continue
        group = groups.setdefault(json_digest(prompt), ([], []))
        group[is_unwanted].append((number, hash(answer)))
    couples: list[tuple[int, int]] = []
    for wanted, others in groups.values():
        count = len(wanted) + len(others)
        if not wanted or not others:
            dropped.add("whose prompt has answers of one kind alone", count)
            continue
        # Those that stand first in both lists come first.
        places = product(*(range(min(len(of), MOST_OF_A_PROMPT)) for of in (wanted, others)))
        taken = [(wanted[i], others[j]) for i, j in sorted(places, key=sum)[:MOST_OF_A_PROMPT]]
        different = [(good[0], bad[0]) for good, bad in taken if good[1] != bad[1]]
        met = {number for couple in taken for number, _ in couple}
        dropped.add(f"beyond the first {MOST_OF_A_PROMPT} pairs of their prompt", count - len(met))
        dropped.add("with chosen equal to rejected", len(met.difference(*different)))
        couples += different

    def read(_: int, couple: tuple[int, int]) -> Pair:
        (messages, chosen), (__, rejected) = (answering.read(rows[number]) for number in couple)
        return Pair(_role_texts(messages), chosen, rejected, couple[0])

    unused = [name for name in (*rows.column_names, *rows.opening) if name not in answering.used]
    return Examples(couples, range(len(couples)), read, dropped, unused)


def _with_a_pair(pairs: Examples[Pair], source: str, found: Sequence[str]) -> Examples[Pair]:
    """Return ``pairs``.

    Raises:
        RecipeError: there is none.
    """
    if not pairs:
        raise RecipeError(
            f"dataset {source} has no usable preference pair{pairs.left_out.why_none}. "
            f"{_expected(found, KNOWN_PAIRS)}"
        )
    return pairs


def prompts_alone(rows: Rows, source: str) -> Examples[list[Message]]:
    """Return the different prompts of ``rows`` in their order.

    What an assistant says at the end of a dialogue isn't part of its prompt.

    Raises:
        RecipeError: the columns are not recognised, or there is no prompt.
    """
    found = rows.column_names
    columns = asked_columns(found)
    if not columns.name:
        raise RecipeError(f"dataset {source}: prompts not found. {_expected(found, KNOWN_PROMPTS)}")

    def read(_: int, row: dict[str, Any]) -> list[Message]:
        return asked_of(row, columns)

    prompts = examples_of(rows, read, columns.used, key=_role_texts)
    if not prompts:
        raise RecipeError(f"dataset {source} has no prompt{prompts.left_out.why_none}")
    return prompts


def pairs_of_answers(examples: Examples[tuple[list[Message], str]]) -> Iterator[Pair]:
    """Yield prompts with one answer each as pairs without a rejected one."""
    for row, (messages, answer) in zip(examples.numbers, examples, strict=True):
        yield Pair(_role_texts(messages), answer, "", row)


def _expected(columns: Sequence[str], known: str) -> str:
    return f"Found: {', '.join(columns) or '(none)'}. Expected {known}."


def _nearest(found: Sequence[str]) -> str:
    """Return which form of pairs lacks the fewest columns, and what to do; empty for none."""
    prompt = asked_columns(found).name or "prompt"
    answer = next((name for name in ANSWERS if name in found), "completion")
    forms: list[tuple[str, ...]] = [(prompt, *names) for names in PAIRS]
    forms += [(prompt, answer, IS_SAFE), (prompt, *LABELLED, *LABELS)]
    missing = {form: [name for name in form if name not in found] for form in forms}
    nearest = min(forms, key=lambda form: len(missing[form]))
    if not set(nearest) & set(found):
        return ""
    answers_alone = "; or set `objective: sft`, which learns from safe answers alone"
    alone = answers_alone if has_answers(found) else ""
    return f" Nearest is {quoted(nearest)}: add {quoted(missing[nearest])}{alone}."


def _role_texts(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in messages)
