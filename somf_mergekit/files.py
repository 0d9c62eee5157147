"""Text files that are whole or as they were."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears, or changes, only when it is complete.

    Raises:
        OSError: it can't be written; nothing is left of the attempt.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
