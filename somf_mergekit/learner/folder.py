"""The folder of a mask that is being learned: one learning has it at a time."""

import contextlib
import os
from collections.abc import Iterator

from ..errors import RecipeError
from ..processes import Processes

_LOCK = "lock"


@contextlib.contextmanager
def learning_folder(mask_folder: str, together: Processes) -> Iterator[str]:
    """Give the folder for the checkpoints of a mask, locked; it goes when nothing is left in it.

    The lock is the system's: it ends with the process that holds it, however that ends.

    Args:
        mask_folder: where the mask goes; the checkpoints go beside it.
        together: this process among those that learn, of which the first holds the lock.

    Raises:
        RecipeError: another learning has the folder, or it can't be written.
    """
    from filelock import FileLock, Timeout

    place = f"{mask_folder}.learning"
    if not together.is_first:
        together.wait()
        yield place
        return
    lock = FileLock(os.path.join(place, _LOCK))
    try:
        os.makedirs(place, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RecipeError(
            f"another process is learning into {mask_folder}: wait for it, or name another place"
        ) from error
    except OSError as error:
        raise RecipeError(f"checkpoints can't be written to {place}: {error.strerror}") from error
    try:
        together.wait()
        yield place
    finally:
        _remove_if_done(place)
        lock.release()


def _remove_if_done(place: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(place):
            # A process that was killed leaves what it had not finished.
            if name.endswith(".partial"):
                os.unlink(os.path.join(place, name))
        if os.listdir(place) == [_LOCK]:
            os.unlink(os.path.join(place, _LOCK))
            os.rmdir(place)
