"""The masks of a sweep: which there are, and which are to be learned."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from ...common.digests import json_digest
from ...common.errors import noted
from ...learner.loop import step_count
from ...mask.artifact import MaskSet
from ...mask.artifact_files import MASKS_FILE, training_history
from ...plugin.merge_check import planned_merge
from ...prepass.learning_data import MaskInputs, merge_inputs
from ...prepass.plan import PlannedMerge
from ...prepass.prepass import mask_for
from ...prepass.provenance import resolved_learning
from .variants import MASK, RECIPE_LABEL, Variant, file_name, with_values


@dataclass(frozen=True)
class WantedMask:
    """A mask that variants share.

    Attributes:
        label: what it is learned with, or where it is given.
        place: its folder, or its file where it is given.
        learning: what learns it, or puts it together, and from what; None for a mask that is there.
    """

    label: str
    place: str
    learning: tuple[PlannedMerge, MaskInputs] | None = None

    def masks(self) -> MaskSet:
        """Return the mask, learned now where it has to be."""
        if self.learning is None:
            return MaskSet.open(self.place)
        return mask_for(*self.learning, self.place)

    def seconds(self) -> float:
        """Return how long its steps took, 0 for a mask that is given."""
        return sum(row["seconds"] for row in training_history(self.place) if self.learning)


def wanted_masks(
    variants: Iterable[Variant], out: Path, options: MergeOptions
) -> tuple[dict[str, WantedMask], list[str]]:
    """Return the masks by what variants call them, the same object for equal ones, and problems.

    Nothing is loaded: merges are planned, and safety data is read.

    Args:
        variants: those that take masks.
        out: the sweep's folder; masks that have to be learned go there.
        options: mergekit's.
    """
    found: dict[str, WantedMask] = {}
    same: dict[str, WantedMask] = {}
    problems: list[str] = []
    # The recipe's own first: it gives its name and folder to those that are the same.
    for variant in sorted(variants, key=lambda variant: variant.mask != RECIPE_LABEL):
        label = variant.mask
        if label in found:
            continue
        found[label] = WantedMask(label, "")
        with noted(problems, f"{label}: "):
            given = variant.learns or with_values(variant.recipes[0], {MASK: label})
            planned = planned_merge(given, options)
            if variant.learns is None:
                inputs = merge_inputs(planned)
                assert inputs is not None  # somf always has some
                (path,) = {own.masks.path for own in inputs.given.values()}
                found[label] = WantedMask(label, path)
                continue
            key = json_digest([list(map(str, planned.models)), resolved_learning(planned)])
            if key not in same:
                inputs = merge_inputs(planned)
                assert inputs is not None
                same[key] = WantedMask(label, str(_folder(out, label)), (planned, inputs))
            found[label] = same[key]
    return found, problems


def relearning_problem(wanted: Iterable[WantedMask], asked: str, out: Path) -> str | None:
    """Return a sentence where masks beside the recipe's own, in ``out``, would have to be learned.

    Args:
        wanted: all masks.
        asked: the parameters that ask for them.
        out: the sweep's folder.
    """
    missing = {
        mask.place: step_count(mask.learning[0].settings, len(mask.learning[1].data.pairs))
        for mask in wanted
        if mask.learning and mask.learning[1].data and not (Path(mask.place) / MASKS_FILE).exists()
    }
    if set(missing) <= {str(_folder(out, RECIPE_LABEL))}:
        return None
    return (
        f"{asked} decides how a mask is learned: {len(missing)} would have to be learned, "
        f"{sum(missing.values()):,} optimiser steps. Give --relearn to learn each once, into a "
        "folder of its own; sweep weight, mask_kind, mask_rescale or the fusion's own parameters "
        "to use one mask for all."
    )


def _folder(out: Path, label: str) -> Path:
    """Return the folder of a mask that is to be learned."""
    if label == RECIPE_LABEL:
        return out / "mask"
    name = file_name(label)
    return out / "masks" / (name if name == label else f"{name}-{json_digest(label)[:8]}")
