"""What work took: seconds, memory, and under which circumstances."""

import hashlib
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import somf_mergekit

from . import compare_make
from .circumstances import circumstances
from .compare_store import read_json


def known_seconds(work: Path) -> dict[str, float]:
    """Return the mean seconds of each kind of work that was done in the work folder."""
    found: dict[str, list[float]] = {}
    for part in _timed_parts(work):
        found.setdefault(part["kind"], []).append(part["wall"])
    return {kind: mean(seconds) for kind, seconds in found.items()}


def _timed_parts(work: Path) -> Iterator[dict[str, Any]]:
    for file in work.glob("*/masks/*/made.json"):
        yield read_json(file)
    for file in work.glob("*/models/*.cost.json"):
        yield read_json(file)
    for file in work.glob("*/runs/*/run.json"):
        record = read_json(file)
        yield from [record["made"]] if "made" in record else []
        yield from record.get("measures", {}).values()


def timed(task: dict[str, Any], kind: str) -> dict[str, Any]:
    """Do a task in a process of its own and return what it took, the process itself as ``wall``."""
    start = time.perf_counter()
    took = compare_make.in_a_process(task)
    return {**took, "wall": time.perf_counter() - start, "kind": kind, **circumstances_now()}


@lru_cache(maxsize=1)
def circumstances_now() -> dict[str, Any]:
    """Return the machine, the versions and the source that work is done with."""
    return {"circumstances": {**circumstances(), "source": _source_digest()}}


def _source_digest() -> str:
    """Return a digest of this package's own code: it may change between two sittings."""
    root = Path(str(somf_mergekit.__file__)).parent
    files = sorted(root.rglob("*.py"))
    contents = b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)
    return hashlib.sha256(contents).hexdigest()[:12]
