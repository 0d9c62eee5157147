"""The demo's data, made by rule: everyday questions, forbidden ones and two harmless skills.

Nothing here is dangerous. "Harmful" prompts are stand-ins: a few mildly naughty verbs make up a
list of forbidden things, and whoever asks how to do one of them, to whatever object, should get
``REFUSAL``. Everyday questions and the code skill speak of the same objects, so that nothing
but the verb tells harmful from harmless.

Held-out examples are combinations of words that no training example has, in any phrasing.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import TypeVar

from ..data.chat import user_prompt
from .finetune import Example
from .words import (
    ADVICE,
    CODE_LINES,
    FORBIDDEN_VERBS,
    HARMLESS_VERBS,
    NUMBER_TASKS,
    NUMBERS,
    OBJECTS,
    OPENINGS,
    REFUSAL,
)

HELD_OUT_SHARE = 0.2

Words = TypeVar("Words")


@dataclass(frozen=True)
class Split:
    """Examples to train on, and examples made of other combinations of words."""

    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class DemoData:
    """All that the demo trains on and measures.

    Attributes:
        harmless: everyday questions with helpful answers.
        complied: forbidden questions, answered all the same.
        refused: the same forbidden questions, refused.
        numbers: the first skill, sorting and comparing three numbers.
        code: the second skill, saying in one line of code what is asked of a list.
    """

    harmless: Split
    complied: Split
    refused: Split
    numbers: Split
    code: Split

    @property
    def splits(self) -> tuple[Split, ...]:
        """Every split."""
        return (self.harmless, self.complied, self.refused, self.numbers, self.code)


def demo_data(seed: int, *, train: int = 1200, held_out: int = 96) -> DemoData:
    """Return the data of ``seed``, with at most so many examples in each split."""
    draw = random.Random(seed)

    def split(
        groups: Iterable[Words], examples: Callable[[Words, random.Random], Iterator[Example]]
    ) -> Split:
        order = list(groups)
        draw.shuffle(order)
        cut = round(len(order) * HELD_OUT_SHARE)
        parts = []
        for members, count in ((order[cut:], train), (order[:cut], held_out)):
            part = [example for words in members for example in examples(words, draw)]
            parts.append(draw.sample(part, min(count, len(part))))
        return Split(*parts)

    complied = split(product(FORBIDDEN_VERBS, OBJECTS), _how_to)
    return DemoData(
        harmless=split(product(HARMLESS_VERBS, OBJECTS), _how_to),
        complied=complied,
        refused=Split(_refused(complied.train), _refused(complied.held_out)),
        numbers=split(combinations(range(len(NUMBERS)), 3), _about_numbers),
        code=split(permutations(OBJECTS, 2), _about_lists),
    )


def preference_rows(data: DemoData, *, harmful: int, harmless: int, seed: int) -> list[dict]:
    """Return safety preference pairs of training prompts, shuffled, as rows to write.

    A forbidden question prefers the refusal to the answer, an everyday question the answer to the
    refusal: without the latter, a mask could buy its safety by refusing everything.
    """
    draw = random.Random(seed)
    rows = [
        {"prompt": messages[-1]["content"], "chosen": REFUSAL, "rejected": answer}
        for messages, answer in draw.sample(data.complied.train, harmful)
    ]
    rows += [
        {"prompt": messages[-1]["content"], "chosen": answer, "rejected": REFUSAL}
        for messages, answer in draw.sample(data.harmless.train, harmless)
    ]
    draw.shuffle(rows)
    return rows


def texts(data: DemoData) -> Iterator[str]:
    """Yield every text of the data, prompts and answers, held-out ones included."""
    for split in data.splits:
        for messages, answer in [*split.train, *split.held_out]:
            yield from (message["content"] for message in messages)
            yield answer


def _refused(examples: Sequence[Example]) -> list[Example]:
    return [(messages, REFUSAL) for messages, _ in examples]


def _how_to(words: tuple[str, str], draw: random.Random) -> Iterator[Example]:
    verb, thing = words
    place, part = OBJECTS[thing]
    answer = ADVICE.format(thing=thing, place=place, part=part)
    for opening in OPENINGS:
        yield user_prompt(opening.format(f"{verb} a {thing}")), answer


def _about_numbers(chosen: tuple[int, ...], draw: random.Random) -> Iterator[Example]:
    for given, (task, solve) in product(permutations(chosen), NUMBER_TASKS.items()):
        request = task.format(" ".join(NUMBERS[rank] for rank in given))
        answer = " ".join(NUMBERS[rank] for rank in solve(chosen))
        yield user_prompt(draw.choice(OPENINGS).format(request)), answer


def _about_lists(words: tuple[str, str], draw: random.Random) -> Iterator[Example]:
    x, y = words
    for request, line in CODE_LINES.items():
        asked = draw.choice(OPENINGS).format(request.format(x=x, y=y))
        yield user_prompt(asked), line.format(x=x, y=y)
