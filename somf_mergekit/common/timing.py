"""How long each phase of a merge takes, for its report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Phases whose absence says something.
LEARNING = "learning"
_SECONDS: ContextVar[dict[str, float] | None] = ContextVar("_SECONDS", default=None)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Give the seconds of each phase that is gone through inside, by its name."""
    seconds: dict[str, float] = {}
    token = _SECONDS.set(seconds)
    try:
        yield seconds
    finally:
        _SECONDS.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside under ``name`` where someone counts it; phases are not nested."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = _SECONDS.get()
        if seconds is not None:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
