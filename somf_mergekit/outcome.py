"""What came of learning a mask, in words: of its end, or of why it was stopped."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .held_out import HeldOut
from .learner.divergence import Evidence, LearningDiverged
from .learner.held_out import held_out_margins
from .learner.problem import LearningProblem
from .learner.tensors import Content
from .mask_folder import HISTORY_FILE, MASKS_FILE
from .masks import MaskSet
from .objectives import PREFERENCES
from .plan import PlannedMerge
from .provenance import told_settings
from .report.census import MaskCensus

# Rows that are named.
_NAMED = 5


def comparison(planned: PlannedMerge, problem: LearningProblem, quiet: bool) -> HeldOut:
    """Return what the held-out pairs tell of the merge under the learned mask and without one.

    Args:
        planned: the merge.
        problem: what was learned from.
        quiet: whether no bar is shown.
    """
    from tqdm import tqdm

    count = 2 * len(problem.together.share(list(range(len(problem.held_out)))))
    with tqdm(total=count, desc="Held-out pairs", unit="pair", leave=False, disable=quiet) as bar:
        plain = held_out_margins(problem, Content.UNMASKED, bar.update)
        merged = held_out_margins(problem, Content.MERGED, bar.update)
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
    kept: str,
    ways: Mapping[str, Any],
) -> str:
    """Return what happened where learning went bad, where the mask is kept, and what to change.

    Args:
        planned: the merge.
        error: what is known.
        steps: of the whole learning.
        kept: the folder of the mask as it was before.
        ways: how the mask was learned, as told with it.
    """
    parts = [f"{error.what} at step {error.step + 1} of {steps}."]
    parts += _tensor_told(error)
    parts += _rows_told(planned, error.evidence)
    parts.append(f"The mask as it was before is kept in {kept} ({MASKS_FILE}, {HISTORY_FILE}).")
    parts.append(f"What to change: {'; '.join(_changes(planned, error.evidence, ways))}.")
    return " ".join(parts)


def told_divergence(error: LearningDiverged) -> dict[str, Any]:
    """Return the same for programs, as JSON; it is told with the mask as it was before."""
    found = error.evidence
    return {
        "step": error.step + 1,
        "what": error.what,
        "tensor": found.tensor,
        "rows": [row for row, _ in found.rows[:_NAMED]],
        "utility_rows": list(found.utility_rows[:_NAMED]),
    }


def _tensor_told(error: LearningDiverged) -> Iterator[str]:
    found = error.evidence
    if found.tensor is None:
        # After a learning that was gone on with, the update before is not known.
        yield from ["No logit had been updated."] * (error.step == 0)
    elif found.share is None:
        more = f", and those of {found.others:,} more tensors are too" * bool(found.others)
        yield f"It is that of {found.tensor}{more}."
    else:
        yield (
            f"The largest update of step {found.of_step + 1} was that of {found.tensor}, with "
            f"{100 * found.share:.0f} % of the gradient's squared norm."
        )


def _rows_told(planned: PlannedMerge, found: Evidence) -> Iterator[str]:
    settings = planned.settings
    if found.utility_rows:
        rows = _listed([str(row) for row in found.utility_rows])
        yield (
            f"The utility term is NaN or infinite on row {rows} of {settings.utility_dataset} "
            "(counted from 0)."
        )
    if not found.rows:
        return
    if math.isfinite(found.rows[0][1]):
        rows = " and ".join(f"row {row} ({loss:.3g})" for row, loss in found.rows[:2])
        told = f"The largest losses of that step were those of {rows}"
    else:
        rows = _listed([str(row) for row, _ in found.rows])
        told = f"The loss is NaN or infinite on row {rows}"
    yield f"{told} of {settings.safety_dataset} (counted from 0)."


def _changes(planned: PlannedMerge, found: Evidence, ways: Mapping[str, Any]) -> Iterator[str]:
    settings = told_settings(planned)
    smaller = ["learning_rate", *["beta"] * (settings["objective"] in PREFERENCES)]
    values = (f"{name} (now {settings[name]})" for name in smaller)
    yield f"a smaller {' or '.join(values)}"
    if found.rows or found.utility_rows:
        yield "look at these rows, and leave them out where they are not what they should be"
    if ways["precision"] != "float32":
        yield f"--precision float32 (SOMF_PRECISION=float32) instead of {ways['precision']}"
    if planned.config.dtype == "float16":
        yield "dtype: bfloat16 or float32"
    if settings["mask_rescale"] == "mean":
        yield "mask_rescale: none, for a mask that is next to empty is divided by its mean"


def _listed(items: Sequence[str]) -> str:
    further = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {further:,} more" if further > 0 else "")
