"""Learning that shows how far it is."""

from typing import Any

from ..common.machine import memory_for
from ..learner.checkpoints import Checkpoints, Progress
from ..learner.interruption import LearningInterrupted, stop_requests
from ..learner.loop import StepReport, learn_logits
from ..learner.problem import LearningProblem


def learn_with_progress(
    problem: LearningProblem,
    progress: Progress,
    checkpoints: Checkpoints,
    quiet: bool,
) -> None:
    """Learn, with a progress bar, from where ``progress`` is.

    Args:
        problem: what is learned; its logits are changed in place.
        progress: the steps done before; changed in place.
        checkpoints: take what is learned every few minutes.
        quiet: show no bar.

    Raises:
        RecipeError: memory runs out.
        LearningInterrupted, LearningDiverged: as of ``learn_logits``.
    """
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def bar(name: str, total: int, **options: Any) -> Any:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=name, disable=quiet, **options)
        return bars[name]

    def on_reference(done: int, total: int) -> None:
        # Several processes can't know of each other here, and end after the first step.
        if checkpoints.stop.signal and problem.together.count == 1:
            raise LearningInterrupted(checkpoints.stop.signal, progress.step)
        reference = bar("Reference", total, unit="example", leave=False)
        reference.update(done - reference.n)
        if done == total:
            reference.close()

    def on_step(report: StepReport) -> None:
        shown = {"loss": report.loss, "accuracy": report.accuracy, "utility": report.utility}
        learning = bar("Learning mask", report.steps, unit="step", initial=report.step - 1)
        learning.set_postfix({k: f"{v:.4f}" for k, v in shown.items() if v is not None})
        learning.update()

    try:
        with stop_requests(checkpoints.stop), memory_for(lambda: f"step {progress.step + 1}"):
            learn_logits(problem, on_step, on_reference, progress, checkpoints)
    finally:
        for shown in bars.values():
            shown.close()
