"""What came of learning a mask, in words: of its end, or of why it was stopped."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.held_out import HeldOut
from ..learner.stopping import LearningDiverged
from ..learner.tensors import Content
from ..learner.training_setup import TrainingSetup, held_out_margins
from ..mask.artifact import MaskSet
from ..mask.census import MaskCensus
from .plan import PlannedMerge
from .provenance import told_settings

# Rows, or tensors, that are named.
_NAMED = 5


def comparison(planned: PlannedMerge, setup: TrainingSetup, quiet: bool) -> HeldOut:
    """Return what the held-out pairs tell of the merge under the learned mask and without one.

    Args:
        planned: the merge.
        setup: what was learned from.
        quiet: whether no bar is shown.
    """
    from tqdm import tqdm

    count = 2 * len(setup.process_group.share(list(range(len(setup.held_out)))))
    with tqdm(total=count, desc="Held-out pairs", unit="pair", leave=False, disable=quiet) as bar:
        plain = held_out_margins(setup, Content.UNMASKED, bar.update)
        merged = held_out_margins(setup, Content.MERGED, bar.update)
    return HeldOut.of(plain, merged, told_settings(planned)["mask_kind"])


def learned_line(masks: MaskSet, compared: HeldOut | str) -> str:
    """Return what came of learning in a line.

    Args:
        masks: that were learned.
        compared: what the held-out pairs tell, or why they tell nothing.
    """
    steps = masks.provenance["steps"]
    told = [f"learned in {steps:,} steps"]
    told += [f"no held-out pairs: {compared}" if isinstance(compared, str) else compared.line]
    collapses = MaskCensus(masks).collapses()
    tensors = {name for collapse in collapses for name in collapse.tensors}
    if steps and tensors:
        ways = ", ".join(f"{c.what} {len(c.tensors):,}" for c in collapses)
        told += [
            f"the masks of {len(tensors):,} of {len(masks.names()):,} tensors have collapsed "
            f"({ways})"
        ]
    return "; ".join(told)


def diverged(
    planned: PlannedMerge,
    error: LearningDiverged,
    steps: int,
    kept: str | None,
    ways: Mapping[str, Any],
) -> str:
    """Return why learning stopped, where the mask is stored, and what to change.

    Args:
        planned: the merge.
        error: what is known.
        steps: of the whole training run.
        kept: the folder of the last mask without a fault; None where there is none.
        ways: how the mask was learned, as recorded with it.
    """
    settings = told_settings(planned)
    told = [f"{error.what} at step {error.step + 1} of {steps}"]
    for what, rows, source in (
        ("loss", error.rows, settings["safety_dataset"]),
        ("utility term", error.utility_rows, settings["utility_dataset"]),
    ):
        if rows:
            told[0] += f"; the {what} on row {_listed(rows)} of {source} (counted from 0)"
    if error.tensors:
        told[0] += f", that of {_listed(error.tensors)}"
    if kept:
        told.append(f"The last good mask is stored in {kept}")
    changes = [f"a smaller learning_rate (now {settings['learning_rate']})"]
    if error.rows or error.utility_rows:
        changes.insert(
            0, "look at these rows, and leave them out if they are not what they should be"
        )
    if ways["precision"] != "float32":
        changes.append(f"--precision float32 (SOMF_PRECISION) instead of {ways['precision']}")
    if planned.config.dtype == "float16":
        changes.append("dtype: bfloat16 or float32")
    if settings["mask_rescale"] == "mean":
        changes.append("mask_rescale: none (a mask that is next to empty is divided by its mean)")
    return f"{'. '.join(told)}. What to try: {'; '.join(changes)}."


def _listed(items: Sequence[Any]) -> str:
    further = len(items) - _NAMED
    return ", ".join(map(str, items[:_NAMED])) + (f" and {further:,} more" if further > 0 else "")
