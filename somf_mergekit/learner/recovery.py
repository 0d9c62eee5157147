"""Back to the last good step of a learning that went bad."""

from .checkpoints import Checkpoints, Progress
from .loop import learn_logits
from .problem import LearningProblem


def gone_back(
    problem: LearningProblem, progress: Progress, checkpoints: Checkpoints, step: int
) -> Progress:
    """Set the logits to what they were after ``step`` steps, and return how far that was.

    They are learned once more from the latest checkpoint before: a step is a function of its
    number and of the logits.

    Args:
        problem: what is learned from.
        progress: how far learning had come.
        checkpoints: of it.
        step: how many steps were good.
    """
    earlier = checkpoints.latest(at_most=step)
    earlier.reference, earlier.unmasked = progress.reference, progress.unmasked
    learn_logits(problem, _untold, _untold, earlier, until=step)
    earlier.history = progress.history[:step]
    return earlier


def _untold(*_: object) -> None:
    """Tell no one."""
