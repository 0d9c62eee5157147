"""What is said where memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import machine
from .errors import RecipeError, first_line


@contextmanager
def memory_for(what: Callable[[], str]) -> Iterator[None]:
    """Tell where memory runs out for something, which is named when it does.

    Raises:
        RecipeError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise RecipeError(
            f"the memory was not enough for {what()} ({first_line(error)}). What checkpoints have "
            "is kept: the same command goes on from there, also with --micro-batch-size 1 "
            "(SOMF_MICRO_BATCH_SIZE) or --engine streaming (SOMF_ENGINE), which need less."
        ) from error
