"""Checksums of JSON and of files, remembered for those that have not changed since."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from typing import Any

from .machine import machine_setting

_BLOCK = 1 << 22
_CACHE_FILE = "file-digests.json"
_MOST_REMEMBERED = 4096
_MOST_BYTES = 1 << 24
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


def file_digests(paths: list[str]) -> list[str]:
    """Return the SHA-256 of the contents of large files, hashed again only where they changed.

    What is remembered is in a folder of the user's own (``SOMF_CACHE_DIR``, else ``somf-mergekit``
    under ``XDG_CACHE_HOME`` or ``~/.cache``). It decides whether a mask is learned anew, so that a
    file of it which anyone else owns or can write is not believed; neither would be one beside the
    models or the output, which may have been made by strangers.

    Raises:
        OSError: a file can't be read.
    """
    folder = _cache_folder()
    known = _remembered(folder) if folder else {}
    found, new = [], {}
    for path in paths:
        state = _state(path)
        digest = known.get(state)
        if digest is None:
            digest = file_digest(path)
            if state == _state(path) and _is_old(path):
                new[state] = digest
        found.append(digest)
    if folder and new:
        with contextlib.suppress(OSError):
            # Another process may have added to it meanwhile.
            _remember(folder, {**_remembered(folder), **new})
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


def _cache_folder() -> str | None:
    """Return where digests are remembered; None where it can't be told whose files are."""
    if not hasattr(os, "geteuid"):
        return None
    chosen = machine_setting("cache_dir")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.abspath(os.path.expanduser(base)), "somf-mergekit")


def _remembered(folder: str) -> dict[str, str]:
    try:
        # Neither folder nor file may be another's, or a link to what is another's.
        if not _is_own(os.lstat(folder), stat.S_ISDIR):
            return {}
        handle = os.open(os.path.join(folder, _CACHE_FILE), os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, encoding="utf-8") as file:
            if not _is_own(os.fstat(handle), stat.S_ISREG):
                return {}
            content = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(value, str) and len(value) == 64}


def _is_own(found: os.stat_result, is_kind: Any) -> bool:
    others = stat.S_IWGRP | stat.S_IWOTH
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & others


def _remember(folder: str, digests: dict[str, str]) -> None:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if not _is_own(os.lstat(folder), stat.S_ISDIR):
        return
    latest = dict(list(digests.items())[-_MOST_REMEMBERED:])
    handle, place = tempfile.mkstemp(prefix=".digests-", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(latest, file, indent=0)
        os.replace(place, os.path.join(folder, _CACHE_FILE))
    except OSError:
        os.unlink(place)
        raise
