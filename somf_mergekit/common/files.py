"""Files that are whole or as they were."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import RecipeError

# What a system says where there is no room to write, or nothing may be written.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOCK = "lock"
# The lock of a process that is just ending is gone after less than this.
_SECONDS = 0.5


def is_of_writing(error: Exception) -> bool:
    """Return whether an error says that a disk takes no more, from Python or from safetensors."""
    if isinstance(error, OSError):
        return error.errno in _NOT_WRITTEN
    # safetensors has one class for all, in whose text the system's error stands with its number.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return bool(found and isinstance(error, SafetensorError) and int(found[1]) in _NOT_WRITTEN)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears, or changes, only when it is complete.

    Raises:
        OSError: it can't be written; nothing is left of the attempt.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: str | os.PathLike[str]) -> None:
    """Put a file's content, or a folder's list of names, on the disk, where the system can.

    Raises:
        OSError: it can't be put there.
    """
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # Some disks of a network have no such thing for folders.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file to write, of the same kind, which takes the place of ``path`` at the end.

    Raises:
        OSError: it can't; nothing is left of the attempt.
    """
    partial = path.with_name(f"partial.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str], in_use: str) -> Iterator[None]:
    """Hold a folder, which is made if it isn't there, for this process alone.

    The lock is the system's: it ends with the process that holds it, however that ends. Its file
    goes at the end, and the folder too if nothing is left in it.

    Args:
        folder: to hold.
        in_use: what is raised if another process holds it.

    Raises:
        RecipeError: another process holds it.
        OSError: it can't be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.join(folder, _LOCK))
    try:
        while not _is_held(lock, folder):
            pass
    except Timeout as error:
        raise RecipeError(in_use) from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)
            os.rmdir(folder)
        lock.release()


def _is_held(lock: Any, folder: str | os.PathLike[str]) -> bool:
    """Take the lock; return False if its file was removed meanwhile, by a process that ended."""
    os.makedirs(folder, exist_ok=True)
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
