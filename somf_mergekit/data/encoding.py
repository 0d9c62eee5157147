"""Pairs as tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import RecipeError
from .chat import AS_GIVEN, Cut, encoded
from .pairs import Pair
from .rendering import Rendering
from .rows import Dropped


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
