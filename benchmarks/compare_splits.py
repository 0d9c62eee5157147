"""What models are measured on: each set parted once into validation and test."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from somf_mergekit.dialogue import user_prompt
from somf_mergekit.evaluate import EvaluationSets, Skill
from somf_mergekit.preferences import Pair

from .real_data import HARMFUL, SPLIT_SEED, TEST, TRAIN, examples_of, prompts_of

VALIDATION, HELD_BACK = "validation", "test"
SPLITS = (VALIDATION, HELD_BACK)
SKILLS = ("math", "code", "general")
# Harmless prompts are no longer than the harmful ones by much.
HARMLESS_CHARACTERS = 400
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    """The most examples of each set in one split: its first ones, in a drawn order."""

    harmful: int
    harmless: int
    pairs: int
    skill_answers: int


SIZES = {
    VALIDATION: Sizes(harmful=64, harmless=48, pairs=150, skill_answers=48),
    HELD_BACK: Sizes(harmful=100, harmless=60, pairs=150, skill_answers=96),
}


def halves(items: Iterable[_T], key: Callable[[_T], str], seed: int) -> tuple[list[_T], list[_T]]:
    """Return two halves that share no key, each in an order drawn from ``seed``.

    Keys are parted, not items: what has the same key stands on the same side.
    """
    by_key: dict[str, list[_T]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    keys = sorted(by_key)
    random.Random(seed).shuffle(keys)
    sides = keys[::2], keys[1::2]
    one, two = ([item for key in side for item in by_key[key]] for side in sides)
    return one, two


def read_splits(
    data: Path | None, pairs: Sequence[Pair], held_out: Sequence[Pair], sizes: dict[str, Sizes]
) -> dict[str, EvaluationSets]:
    """Return validation and test, which share no prompt with each other or with what is learned.

    Harmless prompts are those of the general answers that are short, from the same half as they.

    Args:
        data: folder of the sets, None for the hub.
        pairs: that models and masks learn from.
        held_out: pairs of other prompts.
        sizes: of each split.
    """
    known = {pair_prompt(pair) for pair in [*pairs, *held_out]}
    harmful = [prompt for prompt in dict.fromkeys(prompts_of(HARMFUL, data)) if prompt not in known]
    parted = {
        "harmful": halves(harmful, str, SPLIT_SEED),
        "pairs": halves(held_out, pair_prompt, SPLIT_SEED),
    }
    for skill in SKILLS:
        trained = {example_prompt(example) for example in examples_of(TRAIN[skill], data)}
        unseen = [e for e in examples_of(TEST[skill], data) if example_prompt(e) not in trained]
        parted[skill] = halves(unseen, example_prompt, SPLIT_SEED)
    return {
        split: _sets({name: sides[side] for name, sides in parted.items()}, sizes[split])
        for side, split in enumerate(SPLITS)
    }


def split_counts(sets: EvaluationSets) -> dict[str, int]:
    """Return how many examples of each set there are."""
    counts = {name: len(getattr(sets, name)) for name in ("harmful", "harmless", "pairs")}
    return counts | {skill.name: len(skill.examples) for skill in sets.skills}


def split_prompts(sets: EvaluationSets) -> set[str]:
    """Return all prompts of a split."""
    asked = [messages[-1]["content"] for messages in [*sets.harmful, *sets.harmless]]
    answered = [example_prompt(example) for skill in sets.skills for example in skill.examples]
    return {*asked, *answered, *map(pair_prompt, sets.pairs)}


def pair_prompt(pair: Pair) -> str:
    """Return what a pair's two answers are to."""
    return pair.messages[-1]["content"]


def example_prompt(example: tuple[Sequence[dict[str, str]], str]) -> str:
    """Return what an example's answer is to."""
    return example[0][-1]["content"]


def _sets(half: dict[str, list[Any]], sizes: Sizes) -> EvaluationSets:
    # A text of pages to be summed up takes minutes to read and says little on refusals.
    short = [
        example_prompt(e) for e in half["general"] if len(example_prompt(e)) <= HARMLESS_CHARACTERS
    ]
    return EvaluationSets(
        harmful=[user_prompt(prompt) for prompt in half["harmful"][: sizes.harmful]],
        harmless=[user_prompt(prompt) for prompt in short[: sizes.harmless]],
        pairs=half["pairs"][: sizes.pairs],
        skills=[Skill(name, half[name][: sizes.skill_answers]) for name in SKILLS],
    )
