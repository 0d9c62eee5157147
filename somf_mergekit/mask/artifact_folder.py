"""The folder of a mask artifact: its files, what they tell of each other, and room for them.

The files are masks.safetensors, somf.json, which has the checksums of the others and tells where
the mask is from, and training.jsonl, a row a step.
"""

import json
import os
import shutil
from collections.abc import Mapping

from ..common.digests import file_digest, json_digest
from ..common.errors import RecipeError
from .header import damaged, header_digest, json_content

MASKS_FILE = "masks.safetensors"
PROVENANCE_FILE = "somf.json"
HISTORY_FILE = "training.jsonl"
# In somf.json: the checksums of the other files, and of itself.
CHECKSUMS_KEY = "checksums"
_MOST_BYTES = 1 << 26


def masks_path(source: str) -> str:
    """Return the masks file that ``source`` (file, artifact or merge folder) means.

    Raises:
        RecipeError: there is none.
    """
    source = os.path.expanduser(source)
    candidates = [
        os.path.join(source, MASKS_FILE),
        os.path.join(source, "somf", MASKS_FILE),
    ]
    if os.path.isfile(source):
        return source
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise RecipeError(
        f"mask {source}: no such mask; expected a file or a folder with {MASKS_FILE}, as "
        "`mergekit-somf learn` and somf merges write"
    )


def told_checksums(folder: str) -> dict[str, str] | None:
    """Return the checksums that an artifact's ``somf.json`` has, by file; None where it is missing.

    Raises:
        RecipeError: it can't be read, or is damaged.
    """
    path = os.path.join(folder, PROVENANCE_FILE)
    what = f"{path}, which tells where a mask is from,"
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"{what} can't be read: {error}") from error
    if len(text) > _MOST_BYTES:
        raise damaged(what, f"it has more than {_MOST_BYTES:,} bytes")
    content = json_content(text, what)
    if not isinstance(content, dict):
        raise damaged(what, "it is no JSON object")
    told = content.get(CHECKSUMS_KEY, {})
    if told and content.get("digest") != header_digest(content):
        raise damaged(what, "it has another checksum than when written")
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise damaged(what, f"{CHECKSUMS_KEY} are not texts by file")
    return told


def history_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of what a file tells of the steps of learning but for their times.

    So the record of a mask that is learned once more, or in two parts, is the same. Of a damaged
    file it is that of its bytes.
    """
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return json_digest([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    except (ValueError, AttributeError, RecursionError):
        return file_digest(path)


def history_problem(folder: str, told: Mapping[str, str]) -> str | None:
    """Return what is wrong with the file of a mask's steps, of which checksums may tell."""
    history = os.path.join(folder, HISTORY_FILE)
    if HISTORY_FILE not in told:
        return None
    if not os.path.exists(history):
        return f"{history} is missing"
    if history_digest(history) != told[HISTORY_FILE]:
        return f"{history} has another checksum than when written"
    return None


def folder_problem(folder: str) -> str | None:
    """Return a sentence where ``folder`` holds files, and none of them is a mask."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if not found or MASKS_FILE in found:
        return None
    return f"folder {folder} holds files but no mask: name a new or an empty folder"


def make_room(folder: str) -> None:
    """Put a mask that is in ``folder`` aside, in place of the one that was put there before."""
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        os.replace(folder, without_mask(f"{folder}.before"))


def without_mask(wanted: str) -> str:
    """Return ``wanted``, from which a mask is removed; a numbered name where other files are."""
    if os.path.isfile(os.path.join(wanted, MASKS_FILE)) and not os.path.islink(wanted):
        shutil.rmtree(wanted)
    name, number = wanted, 1
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name
