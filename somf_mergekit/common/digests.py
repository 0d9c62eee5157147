"""Checksums of JSON and of files, remembered for those that have not changed since."""

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from .files import write_whole

_BLOCK = 1 << 22
_CACHE_FILE = "file-digests.json"
_MOST_REMEMBERED = 4096
# A file that was written this shortly ago may change again without another time of change.
_TOO_NEW = 2.0


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of what JSON makes of a value: the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digests(paths: list[str], cache_dir: str | None = None) -> list[str]:
    """Return the SHA-256 of the contents of large files, hashed again only where they changed.

    What is remembered decides whether a mask is learned anew, so a folder or file that anyone
    else owns or can write is ignored.

    Args:
        paths: of the files.
        cache_dir: where digests are remembered; ``SOMF_CACHE_DIR`` where None, else
            ``somf-mergekit`` under ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        OSError: a file can't be read.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    chosen = cache_dir or os.environ.get("SOMF_CACHE_DIR")
    file = Path(chosen or os.path.join(user_cache, "somf-mergekit")).expanduser() / _CACHE_FILE
    known = _remembered(file)
    found, new = [], {}
    for path in paths:
        state = _state(path)
        digest = known.get(state)
        if digest is None:
            digest = file_digest(path)
            if state == _state(path) and _is_old(path):
                new[state] = digest
        found.append(digest)
    if new:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(file.parent):
                # Another process may have added to it meanwhile.
                latest = [*{**_remembered(file), **new}.items()][-_MOST_REMEMBERED:]
                write_whole(file, json.dumps(dict(latest), indent=0))
    return found


def _state(path: str) -> str:
    """Return what changes when a file does: where it is, its size, and when it was written."""
    real = os.path.realpath(path)
    found = os.stat(real)
    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{found.st_dev} {found.st_ino} {found.st_size} {times} {real}"


def _is_old(path: str) -> bool:
    found = os.stat(path)
    return time.time() - max(found.st_mtime, found.st_ctime) > _TOO_NEW


def _remembered(file: Path) -> dict[str, str]:
    """Return the digests in a file by ``_state``, none where others may have written them."""
    try:
        own = _is_own(file.parent) and _is_own(file)
        content = json.loads(file.read_text(encoding="utf-8")) if own else {}
    except (OSError, ValueError):
        return {}
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(value, str) and len(value) == 64}


def _is_own(path: Path) -> bool:
    """Whether this user alone owns and can write a file or folder, which isn't a link."""
    found = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    is_link, owner = stat.S_ISLNK(found.st_mode), os.geteuid() if os.name == "posix" else None
    return not is_link and found.st_uid == owner and not found.st_mode & others
