"""What the comparison starts from: sets parted into splits, an aligned base, specialists."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from somf_mergekit.common.files import write_whole
from somf_mergekit.data.pairs import Pair, read_pairs

from .real_data import (
    HARMFUL,
    SAFETY_PAIRS,
    SPLIT_SEED,
    TEST,
    TRAIN,
    examples_of,
    prompts_of,
    write_examples,
    write_pairs,
    write_sets,
)
from .real_training import (
    ALIGNED,
    SPECIALIST,
    Training,
    make_aligned,
    make_finetuned,
    make_published,
    make_specialist,
)

SPLITS = ("validation", "test")
SKILLS = ("math", "code", "general")
# Harmless prompts are no longer than the harmful ones by much.
HARMLESS_CHARACTERS = 400
# On safe answers, at the rate that aligned the base, for as many steps as a short mask is learned.
SAFETY_TUNED = Training(steps=60, learning_rate=2e-4, seed=1)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    """The most examples of each set in one split: its first ones, in a drawn order."""

    harmful: int
    harmless: int
    pairs: int
    skill: int


@dataclass(frozen=True)
class Effort:
    """How much goes into models and measuring.

    Attributes:
        aligned: how the base is fine-tuned.
        specialist: how each specialist is.
        tuned: how the model that is tuned for safety is; None for none.
        sizes: of the splits, by name.
        skills: of the specialists.
        chat_template: of the published model; None for its own.
    """

    aligned: Training
    specialist: Training
    tuned: Training | None
    sizes: dict[str, Sizes]
    skills: tuple[str, ...] = SKILLS
    chat_template: str | None = None


_VALIDATION = Sizes(harmful=64, harmless=48, pairs=150, skill=48)
FULL = Effort(
    ALIGNED,
    SPECIALIST,
    SAFETY_TUNED,
    {"validation": _VALIDATION, "test": Sizes(harmful=100, harmless=60, pairs=150, skill=96)},
)
# ChatML without a system prompt, which would be a quarter of what is read.
_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
BRIEF = Effort(
    replace(ALIGNED, steps=72, max_length=96, bf16=False),
    replace(SPECIALIST, steps=36, max_length=96, bf16=False),
    None,
    {"validation": _VALIDATION, "test": Sizes(harmful=100, harmless=60, pairs=64, skill=48)},
    ("math", "code"),
    _CHATML,
)
QUICK = Effort(
    replace(ALIGNED, steps=2),
    replace(SPECIALIST, steps=2),
    replace(SAFETY_TUNED, steps=2),
    dict.fromkeys(SPLITS, Sizes(harmful=6, harmless=6, pairs=8, skill=4)),
)


def halves(items: Iterable[_T], key: Callable[[_T], str], seed: int) -> tuple[list[_T], list[_T]]:
    """Return two halves that share no key, each in an order drawn from ``seed``.

    Keys are parted, not items: what has the same key stands on the same side.
    """
    by_key: dict[str, list[_T]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    keys = sorted(by_key)
    random.Random(seed).shuffle(keys)
    one, two = ([item for key in side for item in by_key[key]] for side in (keys[::2], keys[1::2]))
    return one, two


def write_splits(
    folder: Path,
    data: Path | None,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    sizes: dict[str, Sizes],
) -> None:
    """Write validation and test, which share no prompt with each other or with what is learned.

    Harmless prompts are those of the general answers that are short, from the same half as they.

    Args:
        folder: gets ``validation/`` and ``test/``.
        data: folder of the sets, None for the hub.
        pairs: that models and masks learn from.
        held_out: pairs of other prompts.
        sizes: of the splits.
    """
    known = {_prompt(pair.messages) for pair in [*pairs, *held_out]}
    harmful = [prompt for prompt in dict.fromkeys(prompts_of(HARMFUL, data)) if prompt not in known]
    parted: dict[str, Any] = {
        "harmful": halves(harmful, str, SPLIT_SEED),
        "pairs": halves(held_out, lambda pair: _prompt(pair.messages), SPLIT_SEED),
    }
    for skill in SKILLS:
        trained = {_prompt(messages) for messages, _ in examples_of(TRAIN[skill], data)}
        unseen = [e for e in examples_of(TEST[skill], data) if _prompt(e[0]) not in trained]
        parted[skill] = halves(unseen, lambda example: _prompt(example[0]), SPLIT_SEED)
    for side, split in enumerate(SPLITS):
        most, place = sizes[split], folder / split
        place.mkdir(parents=True, exist_ok=True)
        # A text of pages to be summed up takes minutes to read and says little on refusals.
        general = [_prompt(messages) for messages, _ in parted["general"][side]]
        short = [prompt for prompt in general if len(prompt) <= HARMLESS_CHARACTERS]
        prompts = {"harmful": parted["harmful"][side][: most.harmful]}
        prompts["harmless"] = short[: most.harmless]
        for name, rows in prompts.items():
            lines = (json.dumps({"prompt": row}, ensure_ascii=False) + "\n" for row in rows)
            write_whole(place / f"{name}.jsonl", "".join(lines))
        write_pairs(place / "pairs.jsonl", parted["pairs"][side][: most.pairs])
        for skill in SKILLS:
            write_examples(place / f"{skill}.jsonl", parted[skill][side][: most.skill])


def make_inputs(
    work: Path, data: Path | None, source: str, seeds: Sequence[int], effort: Effort
) -> None:
    """Write sets and models, those that are not there.

    Args:
        work: gets ``sets/``, ``models/`` and ``seed-N/models/``.
        data: folder of the sets, None for the hub.
        source: hub id or folder of the published model.
        seeds: of the specialists and of the model that is tuned for safety.
        effort: how much goes into them.
    """
    sets, models = work / "sets", work / "models"
    models.mkdir(parents=True, exist_ok=True)
    sets.mkdir(exist_ok=True)
    pairs, held_out = write_sets(sets, data)
    write_splits(sets, data, pairs, held_out, effort.sizes)
    published, aligned = models / "published", models / "aligned"
    make_published(published, source)
    if effort.chat_template:
        write_whole(published / "chat_template.jinja", effort.chat_template)
    make_aligned(aligned, published, pairs, data, effort.aligned)
    for seed in seeds:
        folder = work / f"seed-{seed}" / "models"
        folder.mkdir(parents=True, exist_ok=True)
        for skill in effort.skills:
            training = replace(effort.specialist, seed=effort.specialist.seed + seed)
            make_specialist(folder / skill, aligned, skill, data, training)
        if effort.tuned is None:
            continue
        training = replace(effort.tuned, seed=effort.tuned.seed + seed)
        chosen = read_pairs(str(sets / SAFETY_PAIRS)).sampled(training.examples, training.seed)
        examples = [(pair.messages, pair.chosen) for pair in chosen]
        make_finetuned(folder / "safe", aligned, examples, training, "safe answers")


def _prompt(messages: Sequence[dict[str, str]]) -> str:
    return messages[-1]["content"]
