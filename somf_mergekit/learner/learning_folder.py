"""The folder of a mask that is being learned: one training run has it at a time."""

import contextlib
import os
from collections.abc import Iterator

from ..common.errors import RecipeError
from ..common.files import locked
from ..common.process_group import Processes


@contextlib.contextmanager
def learning_folder(mask_folder: str, together: Processes) -> Iterator[str]:
    """Give the folder for the checkpoints of a mask, locked; it goes when nothing is left in it.

    Args:
        mask_folder: where the mask goes; the checkpoints go beside it.
        together: this process among those that learn, of which the first holds the lock.

    Raises:
        RecipeError: another training run has the folder, or it can't be written.
    """
    place = checkpoint_folder(mask_folder)
    with contextlib.ExitStack() as lock:
        together.first_does(lambda: _lock(place, mask_folder, lock))
        yield place


def _lock(place: str, mask_folder: str, lock: contextlib.ExitStack) -> None:
    """Hold the folder until ``lock`` ends."""
    in_use = f"another process is learning into {mask_folder}: wait for it, or name another place"
    try:
        lock.enter_context(locked(place, in_use))
        for name in os.listdir(place):
            # A process that was killed leaves what it had not finished.
            if name.endswith(".partial"):
                os.unlink(os.path.join(place, name))
    except OSError as error:
        raise RecipeError(f"checkpoints can't be written to {place}: {error.strerror}") from error


def checkpoint_folder(mask_folder: str) -> str:
    """Return where the checkpoints of a mask go that is learned into ``mask_folder``."""
    return f"{mask_folder}.learning"
