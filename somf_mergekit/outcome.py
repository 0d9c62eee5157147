"""What came of learning a mask: held-out pairs, and what its last line says."""

from .held_out import HeldOut
from .learner.held_out import held_out_margins
from .learner.passes import LearningProblem
from .learner.tensors import Content
from .masks import MaskSet
from .plan import PlannedMerge
from .provenance import told_settings
from .report.census import MaskCensus


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
