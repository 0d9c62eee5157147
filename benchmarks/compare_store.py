"""Files that are whole or not there."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from somf_mergekit.files import write_whole


def read_json(file: Path) -> dict[str, Any]:
    """Return what a file holds, {} where there is none."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that appears, or changes, only when it is complete."""
    write_whole(file, json.dumps(content, indent=1) + "\n")


def removed(folder: Path) -> None:
    """Remove a folder so that no part of it can be taken for the whole."""
    if folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(folder, partial)
        shutil.rmtree(partial)


@contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Keep other processes from what ``lock`` stands for; the system lets go when this one ends.

    Args:
        lock: a file, made where it is not there; it stays.
        wait: until no other process has it.

    Yields:
        whether it is this process's; always, where it waits.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
