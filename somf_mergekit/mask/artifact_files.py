"""The files of a mask artifact: where they are, and the training history among them."""

import json
import os
from typing import Any

from ..common.digests import file_digest, json_digest
from ..common.errors import RecipeError
from .format import DIGEST_KEY, checked_json
from .published import published_folder

MASKS_FILE = "masks.safetensors"
PROVENANCE_FILE = "somf.json"
HISTORY_FILE = "training.jsonl"
CARD_FILE = "README.md"
# In somf.json: the checksums of the other files.
CHECKSUMS_KEY = "checksums"
# What is of the file itself there, not recorded with the mask.
RECORD_KEYS = (CHECKSUMS_KEY, DIGEST_KEY)


def masks_path(source: str, cache_dir: str | None = None) -> str:
    """Return the masks file that ``source`` (file, artifact or merge folder) means.

    What isn't there may be the id of a published mask, ORGANISATION/NAME or with @REVISION behind
    it, which is fetched into the hub's cache: ``cache_dir``, or its client's own.

    Raises:
        RecipeError: there is none.
    """
    place = os.path.expanduser(source)
    for inside in ((), (MASKS_FILE,), ("somf", MASKS_FILE)):
        path = os.path.join(place, *inside)
        if os.path.isfile(path):
            return path
    if not os.path.exists(place):
        files = (MASKS_FILE, PROVENANCE_FILE, HISTORY_FILE, CARD_FILE)
        folder = published_folder(source, files, cache_dir)
        if folder:
            return os.path.join(folder, MASKS_FILE)
    raise RecipeError(
        f"mask {source}: no such mask; expected a file or a folder with {MASKS_FILE}, as "
        "`mergekit-somf learn` and somf merges write, or the id of one on the hub"
    )


def training_history(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows that learning wrote into a mask's folder, none where it wrote none."""
    path = os.path.join(folder, HISTORY_FILE)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def history_digest(path: str) -> str:
    """Return the SHA-256 of the recorded steps of learning, without their times.

    A mask that is learned once more, or in two parts, has the same. For a damaged file it is that
    of its bytes.
    """
    try:
        rows = training_history(os.path.dirname(path))
        return json_digest([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    except (ValueError, AttributeError, RecursionError):
        return file_digest(path)


def record_beside(masks: str) -> dict[str, Any] | None:
    """Return what ``somf.json`` beside a masks file records; None where there is none.

    So it is where the masks file has another name than an artifact's.

    Raises:
        RecipeError: it can't be read, or is damaged.
    """
    if os.path.basename(masks) != MASKS_FILE:
        return None
    path = os.path.join(os.path.dirname(masks), PROVENANCE_FILE)
    what = f"{path}, which records where a mask is from,"
    try:
        with open(path, "rb") as file:
            return checked_json(file.read(), what)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"{what} can't be read: {error}") from error


def checksums_beside(masks: str) -> dict[str, Any] | None:
    """Return the checksums that ``record_beside`` has, by file; errors are the same."""
    record = record_beside(masks)
    checksums = (record or {}).get(CHECKSUMS_KEY, {})
    if record is None:
        return None
    return checksums if isinstance(checksums, dict) else {}
