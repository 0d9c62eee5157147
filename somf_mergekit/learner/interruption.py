"""Ctrl-C and SIGTERM while a mask is learned: the step is finished, and what is done is kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click


class LearningInterrupted(click.ClickException):
    """Someone asked the process to end; learning goes on when the same command is given again.

    click commands print it as one message and exit as the signal would have ended them.
    """

    def __init__(self, number: int, step: int):
        done = f"after step {step}, which is kept" if step else "before the first step"
        super().__init__(f"stopped {done}: give the same command again to go on")
        self.exit_code = 128 + number  # type: ignore[misc]


class StopRequests:
    """Whether the process was asked to end.

    Attributes:
        signal: the number of the signal that asked; None as long as none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None


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
