"""The folder of a mask that is being learned: one training run has it at a time."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..errors import RecipeError
from ..processes import Processes

_LOCK = "lock"
# The lock of a process that is just ending is gone after less than this.
_SECONDS = 0.5


@contextlib.contextmanager
def learning_folder(mask_folder: str, together: Processes) -> Iterator[str]:
    """Give the folder for the checkpoints of a mask, locked; it goes when nothing is left in it.

    The lock is the system's: it ends with the process that holds it, however that ends.

    Args:
        mask_folder: where the mask goes; the checkpoints go beside it.
        together: this process among those that learn, of which the first holds the lock.

    Raises:
        RecipeError: another training run has the folder, or it can't be written.
    """
    place = f"{mask_folder}.learning"
    with contextlib.ExitStack() as locks:
        together.first_does(lambda: _lock(place, mask_folder, locks))
        yield place


def _lock(place: str, mask_folder: str, locks: contextlib.ExitStack) -> None:
    """Hold the folder until ``locks`` ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.join(place, _LOCK))
    try:
        while not _is_held(lock, place):
            pass
        locks.callback(lock.release)
        locks.callback(_remove_if_done, place)
        for name in os.listdir(place):
            # A process that was killed leaves what it had not finished.
            if name.endswith(".partial"):
                os.unlink(os.path.join(place, name))
    except Timeout as error:
        raise RecipeError(
            f"another process is learning into {mask_folder}: wait for it, or name another place"
        ) from error
    except OSError as error:
        raise RecipeError(f"checkpoints can't be written to {place}: {error.strerror}") from error


def _is_held(lock: Any, place: str) -> bool:
    """Take the lock; return False where its file was removed meanwhile, by a process that ended."""
    os.makedirs(place, exist_ok=True)
    try:
        with open(lock.lock_file, "ab") as file:
            number = os.fstat(file.fileno()).st_ino
        lock.acquire(timeout=_SECONDS)
        # The file of this name, not one that has lost it, is what others would lock.
        if os.stat(lock.lock_file).st_ino == number:
            return True
    except FileNotFoundError:
        pass
    lock.release()
    return False


def _remove_if_done(place: str) -> None:
    with contextlib.suppress(OSError):
        if os.listdir(place) == [_LOCK]:
            os.unlink(os.path.join(place, _LOCK))
            os.rmdir(place)
