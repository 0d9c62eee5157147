"""Files that are whole or as they were."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears, or changes, only when it is complete.

    Raises:
        OSError: it can't be written; nothing is left of the attempt.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
