"""What ends learning before its last step.

After Ctrl-C or SIGTERM the step is finished, and what is done is stored. A loss or a gradient that
is NaN or infinite ends it at once.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click


class LearningInterrupted(click.ClickException):
    """Someone asked the process to end; learning goes on when the same command is given again.

    click commands print it as one message and exit as the signal would have ended them.
    """

    def __init__(self, number: int, step: int):
        done = f"after step {step}, which is stored" if step else "before the first step"
        super().__init__(f"stopped {done}: give the same command again to go on")
        self.exit_code = 128 + number  # type: ignore[misc]


@dataclass
class StopRequests:
    """Whether the process was asked to end.

    Attributes:
        signal: the number of the signal that asked; None as long as none did.
    """

    signal: int | None = None


@contextmanager
def stop_requests(requests: StopRequests) -> Iterator[None]:
    """Note the first Ctrl-C or SIGTERM in ``requests``; a second one ends the process as ever.

    Signals reach the main thread alone: in another, nothing is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        requests.signal = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()


@dataclass
class LearningDiverged(ArithmeticError):
    """A loss or a gradient isn't finite.

    Nothing else is watched for: a step moves a logit by at most the learning rate.

    Attributes:
        step: at which it was seen, counted from 0.
        rows: of the safety data whose loss isn't finite.
        utility_rows: of the utility data whose term isn't finite.
        tensors: whose gradient isn't finite, from the model's input to its output; empty where a
            loss was seen first, and the logits are those before the step.
    """

    step: int
    rows: Sequence[int] = ()
    utility_rows: Sequence[int] = ()
    tensors: Sequence[str] = ()

    @property
    def what(self) -> str:
        """What happened, in words."""
        return f"{'a gradient' if self.tensors else 'the loss'} became NaN or infinite"

    @property
    def is_intact(self) -> bool:
        """Whether the logits are those before the step."""
        return not self.tensors

    def record(self) -> dict[str, Any]:
        """Return what is stored with the mask as it was before, as JSON; rows count from 0."""
        return {
            "step": self.step + 1,
            "what": self.what,
            "rows": list(self.rows),
            "utility_rows": list(self.utility_rows),
            "tensors": list(self.tensors),
        }
