"""What a merge's mask is learned from: models that fit each other, data that is usable."""

from dataclasses import dataclass
from typing import Any

from .answers import EncodedAnswer, answered_prompts, encoded_answers, has_answers
from .contracts import LEARNING, check_contracts
from .errors import RecipeError, raise_together
from .granularity import mask_layout, weight_storage
from .headers import checkpoint_problems, planned_tensors
from .masks import MaskSet
from .method import mask_shape_problem
from .plan import PlannedMerge, learning_problem, vocabulary_aligned
from .preferences import (
    EncodedPair,
    encoded_pairs,
    preference_pairs,
    sampled,
)
from .report.measured import measuring_problems
from .rows import dataset_rows

CANT_BE_MADE = "This merge can't be made"


@dataclass(frozen=True)
class SafetyData:
    """Tokenised data of a recipe.

    Attributes:
        pairs: in the order of the first epoch.
        dropped: rows of the safety data left out and why, in words; empty where none was.
        utility: harmless prompts with answers, in the order of the first epoch.
    """

    pairs: list[EncodedPair]
    dropped: str
    utility: list[EncodedAnswer]


def checked_data(planned: PlannedMerge) -> SafetyData:
    """Return the safety data after checking it and the models against each other.

    Raises:
        RecipeError: everything that is wrong, together; or what learning needs is not installed.
    """
    check_contracts(LEARNING)
    problems = checkpoint_problems(planned)
    impossible = learning_problem(planned)
    problems += [impossible] if impossible else []
    pairs: list[EncodedPair] = []
    utility: list[EncodedAnswer] = []
    dropped = ""
    try:
        pairs, dropped = _safety_data(planned)
    except RecipeError as error:
        problems.append(error.message)
    try:
        utility = _utility_data(planned)
    except RecipeError as error:
        problems.append(f"parameters.utility_dataset: {error.message}")
    problems += measuring_problems(planned)
    raise_together(problems, CANT_BE_MADE)
    return SafetyData(pairs, dropped, utility)


def given_mask(planned: PlannedMerge, source: str) -> MaskSet:
    """Return the learned mask that a recipe names, after checking it against the models.

    Raises:
        RecipeError: everything that does not fit, together.
    """
    masks = MaskSet.open(source)
    problems = checkpoint_problems(planned)
    planned_for = {
        name: tensor for name, tensor in planned_tensors(planned).items() if tensor.may_get_mask
    }
    if not any(mask.kept_as in masks for mask in planned_for.values()):
        problems.append(
            f"mask {source}: none of its {len(masks.names())} tensors is in this merge (it has "
            f"{', '.join(masks.names()[:2])} ...): the mask is of another model"
        )
    aligned = vocabulary_aligned(planned)
    storage = weight_storage(planned.out_config)
    asks = "granularity" in (planned.config.parameters or {})
    for name, mask in planned_for.items():
        if mask.kept_as not in masks:
            continue
        if name not in aligned:
            problem = mask_shape_problem(name, masks.shape(mask.kept_as), mask.shape, source)
            if problem:
                problems.append(problem)
                continue
        layout = masks.layout(mask.kept_as)
        if asks and layout.shape != mask_layout(mask.granularity, name, mask.shape, storage).shape:
            problems.append(
                f"parameters.granularity: {mask.granularity} does not fit the mask {source}, "
                f"whose entries for {name} have the shape {layout.shape}: leave granularity out, "
                "or learn a mask anew"
            )
            break
    problems += measuring_problems(planned)
    raise_together(problems, CANT_BE_MADE)
    return masks


def _safety_data(planned: PlannedMerge) -> tuple[list[EncodedPair], str]:
    settings = planned.settings
    source = settings.safety_dataset or ""
    rows = dataset_rows(source, settings.safety_split, settings.safety_config)
    columns = rows.column_names
    if settings.objective == "sft" and "rejected" not in columns and has_answers(columns):
        return _safe_answers(planned, rows, source)
    pairs, left_out = preference_pairs(rows, source)
    chosen = sampled(pairs, settings.safety_samples, settings.seed)
    encoded, cut = encoded_pairs(chosen, planned.tokenizer, settings.max_length, source)
    return encoded, ", ".join(filter(None, (str(left_out), str(cut))))


def _safe_answers(planned: PlannedMerge, rows: Any, source: str) -> tuple[list[EncodedPair], str]:
    settings = planned.settings
    examples, left_out = answered_prompts(rows, source)
    chosen = sampled(examples, settings.safety_samples, settings.seed)
    encoded = encoded_answers(chosen, planned.tokenizer, settings.max_length, source)
    return [EncodedPair(e.prompt, e.answer, []) for e in encoded], str(left_out)


def _utility_data(planned: PlannedMerge) -> list[EncodedAnswer]:
    settings = planned.settings
    source = settings.utility_dataset
    if not source:
        return []
    rows = dataset_rows(source, settings.utility_split, settings.utility_config)
    examples, _ = answered_prompts(rows, source)
    chosen = sampled(examples, settings.utility_samples, settings.seed)
    return encoded_answers(chosen, planned.tokenizer, settings.max_length, source)
