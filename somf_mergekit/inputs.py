"""What a merge's mask is learned from: models that fit each other, data that is usable."""

import math
from dataclasses import dataclass
from typing import Any

from mergekit.graph import Executor

from . import machine
from .errors import RecipeError, raise_together
from .learner.loop import step_count
from .masks import MaskSet
from .method import mask_shape_problem
from .preferences import (
    EncodedPair,
    dataset_rows,
    encoded_pairs,
    preference_pairs,
    sampled_pairs,
)
from .sources import PlannedMerge, checkpoint_problems, planned_shapes, vocabulary_aligned

CANT_BE_MADE = "This merge can't be made"


@dataclass(frozen=True)
class SafetyData:
    """Tokenised pairs of a recipe.

    Attributes:
        pairs: in the order of the first epoch.
        dropped: what was left out and why, in words; empty where nothing was.
    """

    pairs: list[EncodedPair]
    dropped: str


@dataclass(frozen=True)
class Forecast:
    """What learning a recipe's mask would take, at most: told without loading weights.

    Attributes:
        tensors: tensors that may get a mask.
        entries: mask entries of all of them.
        pairs: preference pairs.
        steps: optimiser steps.
        micro_batch: pairs that go through the model at once.
        memory: bytes for weights, task vectors, logits, gradients and optimiser.
    """

    tensors: int
    entries: int
    pairs: int
    steps: int
    micro_batch: int
    memory: int


def checked_data(planned: PlannedMerge) -> SafetyData:
    """Return the safety data after checking it and the models against each other.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    problems = checkpoint_problems(planned)
    try:
        data = _safety_data(planned)
    except RecipeError as error:
        raise_together([*problems, error.message], CANT_BE_MADE)
        raise
    raise_together(problems, CANT_BE_MADE)
    return data


def forecast(planned: PlannedMerge, data: SafetyData) -> Forecast:
    """Return what learning the mask of a recipe would take."""
    settings = planned.settings
    shapes = planned_shapes(planned)
    total = sum(math.prod(shape) for shape in shapes.values())
    return Forecast(
        tensors=len(shapes),
        entries=total,
        pairs=len(data.pairs),
        steps=step_count(settings, len(data.pairs)),
        micro_batch=micro_batch(planned),
        # Merged weight, task vector, logits, weight gradient, and Adam's two moments in float32;
        # the base in the recipe's dtype, float32 at most.
        memory=total * 7 * 4,
    )


def given_mask(planned: PlannedMerge, source: str) -> MaskSet:
    """Return the learned mask that a recipe names, after checking it against the models.

    Raises:
        RecipeError: everything that does not fit, together.
    """
    masks = MaskSet.open(source)
    problems = checkpoint_problems(planned)
    if not any(weight.name in masks for weight, _ in planned.tensors):
        problems.append(
            f"mask {source}: none of its {len(masks.names())} tensors is in this merge (it has "
            f"{', '.join(masks.names()[:2])} ...): the mask is of another model"
        )
    aligned = vocabulary_aligned(planned)
    for name, shape in planned_shapes(planned).items():
        if name in masks and name not in aligned:
            problem = mask_shape_problem(name, masks.shape(name), shape, source)
            problems += [problem] if problem else []
    raise_together(problems, CANT_BE_MADE)
    return masks


def micro_batch(planned: PlannedMerge) -> int:
    """Return how many pairs go through the model at once on this machine."""
    settings = planned.settings
    # Half of what is free: the other half is for weights, logits and the optimiser.
    free = machine.free_memory(planned.options.device or "cpu") // 2
    return machine.micro_batch_pairs(
        planned.out_config, settings.max_length, settings.batch_size, free
    )


def _safety_data(planned: PlannedMerge) -> SafetyData:
    settings = planned.settings
    source = settings.safety_dataset or ""
    rows = dataset_rows(source, settings.safety_split, settings.safety_config)
    pairs, left_out = preference_pairs(rows, source)
    chosen = sampled_pairs(pairs, settings.safety_samples, settings.seed)
    encoded, cut = encoded_pairs(chosen, _tokenizer(planned), settings.max_length, source)
    return SafetyData(encoded, ", ".join(filter(None, (str(left_out), str(cut)))))


def _tokenizer(planned: PlannedMerge) -> Any:
    from transformers import AutoTokenizer

    if planned.tokenizer_task is not None:
        executor = Executor([planned.tokenizer_task])
        for _, info in executor.run(quiet=True):
            return info.tokenizer
    base = planned.base_model.model
    try:
        return AutoTokenizer.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=planned.options.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"the base {base} has no tokenizer that loads: {error}") from error
