"""How long each phase of a merge takes, for its report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Phases whose absence says something.
LEARNING = "learning"


class Timer(dict[str, float]):
    """The seconds of each phase, by its name."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside under ``name``; phases are not nested."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start
