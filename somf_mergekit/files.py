"""Files that are whole or as they were."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What a system says where there is no room to write, or nothing may be written.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_of_writing(error: Exception) -> bool:
    """Return whether an error says that a disk takes no more, told by Python or by safetensors."""
    if isinstance(error, OSError):
        return error.errno in _NOT_WRITTEN
    return isinstance(error, SafetensorError) and "serializing" in str(error)


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
