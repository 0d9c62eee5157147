"""Preference pairs, prompts with answers and prompts alone: what the rows of a dataset give."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.errors import RecipeError
from .chat import AS_GIVEN, Cut, Message, encoded
from .conversations import (
    ANSWERS,
    DIALOGUE,
    IS_SAFE,
    LABEL,
    LABELLED,
    LABELS,
    PAIR,
    PROMPT_NAMES,
    SYSTEM,
    dialogue_of,
    known_rows,
    prompt_columns,
    prompt_of,
    quoted,
    truth,
)
from .rendering import Rendering
from .rows import Dropped, Examples, Rows, Unusable, examples_of

KNOWN_PAIRS = (
    "'chosen' and 'rejected' (text or message lists) beside a prompt "
    f"({PROMPT_NAMES}), or as whole dialogues with the same beginning; or a prompt with "
    f"{quoted((*LABELLED, *LABELS))}"
)
KNOWN_ANSWERS = (
    f"a prompt ({PROMPT_NAMES}) with an answer ({quoted(ANSWERS)}); or '{DIALOGUE}', a message "
    f"list that ends with the assistant's answer. Of '{IS_SAFE}', and of '{LABEL}' beside "
    f"'completion' or '{DIALOGUE}', the true ones are used"
)
KNOWN_PROMPTS = f"{PROMPT_NAMES} (text or message lists), or '{DIALOGUE}'"


@dataclass(frozen=True)
class Pair:
    """One prompt with its safe (``chosen``) and its unsafe (``rejected``) answer.

    Of a prompt with one answer, ``rejected`` is empty. ``row`` is the dataset's that it is from,
    counted from 0.
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

    Of a prompt with one answer, ``rejected`` is empty. ``row`` is the dataset's that it is from,
    counted from 0; ``cut`` says what was taken.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] = field(default_factory=list)
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
    labels = () if set(PAIR) <= set(found) else LABELS
    used = (*(LABELLED if labels else PAIR), *labels)
    if labels and not (columns.name and set(used) <= set(found)):
        raise RecipeError(
            f"dataset {source}: columns not recognised. {_expected(found, KNOWN_PAIRS)}"
        )

    def read(number: int, row: dict[str, Any]) -> Pair:
        prompt = prompt_of(row, columns)
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

    pairs = examples_of(rows, read, columns.used.union(used))
    if not pairs:
        raise RecipeError(
            f"dataset {source} has no usable preference pair{pairs.left_out.why_none}. "
            f"{_expected(found, KNOWN_PAIRS)}"
        )
    return pairs


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
            f"dataset {source}: prompts with answers not found. {_expected(found, KNOWN_ANSWERS)}"
        )
    answer = _answer_column(found)
    columns = prompt_columns(found if answer else [name for name in found if name in SYSTEM])
    answer = answer or DIALOGUE
    labels = {IS_SAFE: "not safe"}
    if answer in (DIALOGUE, "completion"):
        labels[LABEL] = "not wanted"
    labels = {name: reason for name, reason in labels.items() if name in found}

    def read(_: int, row: dict[str, Any]) -> tuple[list[Message], str]:
        for name, reason in labels.items():
            label = truth(row[name])
            if label is None:
                raise Unusable(f"with neither true nor false for {name}")
            if not label:
                raise Unusable(reason)
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
    found = rows.column_names
    columns = prompt_columns(found)
    if not columns.name and DIALOGUE not in found:
        raise RecipeError(f"dataset {source}: prompts not found. {_expected(found, KNOWN_PROMPTS)}")
    columns = replace(columns, name=columns.name or DIALOGUE)

    def read(_: int, row: dict[str, Any]) -> list[Message]:
        messages = prompt_of(row, columns)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise Unusable("without a prompt")
        return messages

    prompts = examples_of(rows, read, columns.used, key=_role_texts)
    if not prompts:
        raise RecipeError(f"dataset {source} has no prompt{prompts.left_out.why_none}")
    return prompts


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
        how: the chat template is rendered.

    Returns:
        The usable pairs, and how many were left out by reason.

    Raises:
        RecipeError: the chat template refuses a row; or nothing is left of any answer, or of the
            difference between two.
    """
    usable: list[EncodedPair] = []
    dropped = Dropped()
    for pair in pairs:
        if len(usable) == enough:
            break
        texts = [pair.chosen, pair.rejected] if pair.rejected else [pair.chosen]
        try:
            found = encoded(tokenizer, pair.messages, texts, max_length, how)
        except RecipeError as error:
            raise RecipeError(f"dataset {source}, row {pair.row}: {error.message}") from error
        if not found.prompt and found.cut.prompt:
            dropped.add(f"whose last question has no room in {max_length} tokens")
        elif not found.prompt or not all(found.answers):
            dropped.add("without an answer after tokenisation")
        elif pair.rejected and found.answers[0] == found.answers[1]:
            dropped.add(f"with equal answers in the first {max_length} tokens")
        else:
            chosen, rejected = [*found.answers, []][:2]
            usable.append(EncodedPair(found.prompt, chosen, rejected, pair.row, found.cut))
    if not usable:
        raise RecipeError(
            f"dataset {source}: no answer is usable after tokenisation ({dropped}); "
            "raise max_length or use other data"
        )
    return usable, dropped


def pairs_of_answers(examples: Examples[tuple[list[Message], str]]) -> Iterator[Pair]:
    """Yield prompts with one answer each as pairs without a rejected one."""
    for row, (messages, answer) in zip(examples.numbers, examples, strict=True):
        yield Pair(_role_texts(messages), answer, "", row)


def _answer_column(columns: Sequence[str]) -> str | None:
    """Return the column of the answers, None where there is none or no prompt beside them."""
    if not prompt_columns(columns).name:
        return None
    return next((name for name in ANSWERS if name in columns), None)


def _expected(columns: Sequence[str], known: str) -> str:
    return f"Found: {', '.join(columns) or '(none)'}. Expected {known}."


def _role_texts(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in messages)
