"""Where the models of a recipe lie: in folders, in the hub's cache, or on the hub."""

import os
import re
from pathlib import PureWindowsPath

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mergekit.common import ModelReference

# How the hub's cache stores a model: models--ORG--NAME/snapshots/REVISION.
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")

# What quantized copies add to a name.
_QUANTIZED = re.compile(r"((-unsloth)?-bnb-[48]bit|-gptq(-.*)?|-awq|-fp8)$", re.IGNORECASE)


def path_problem(model: ModelReference) -> str | None:
    """Return a sentence where a model or its adapter is neither a folder nor a hub id."""
    for part in filter(None, (model.model, model.lora)):
        path = part.path
        if os.path.exists(path) or hub_id(path) == path:
            continue
        if os.path.isdir(str(model)):
            # A name of several parts, none of which is there.
            return (
                "mergekit takes the + in this path for BASE+ADAPTER and an @ for PATH@REVISION: "
                "rename the folder, or give a link to it"
            )
        if PureWindowsPath(path).drive and os.name != "nt":
            why = "this is a Windows path; give the path of the folder on this machine"
        elif path.startswith("~"):
            why = f"mergekit doesn't expand ~: write {os.path.expanduser(path)}"
        elif "://" in path:
            why = "mergekit takes no address: give the model's id on the hub, ORGANISATION/NAME"
        else:
            why = "there is no such folder, and it can't be an id on the hub (ORGANISATION/NAME)"
        return why if path == str(model) else f"{path or 'an empty name'}: {why}"
    return None


def hub_id(path: str) -> str | None:
    """Return the id on the hub of what a path names: itself, or that of a folder in the cache."""
    stored = _SNAPSHOT.search(os.path.abspath(path))
    if stored:
        return stored[1].replace("--", "/")
    if os.path.exists(path):
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def local_folder(path: str, revision: str | None = None) -> str | None:
    """Return the folder of a model that is on this machine, in the hub's cache for one."""
    if os.path.isdir(path):
        return path
    name = hub_id(path)
    found = try_to_load_from_cache(name, "config.json", revision=revision) if name else None
    return os.path.dirname(found) if isinstance(found, str) else None


def is_quantized_copy(path: str) -> bool:
    """Return whether a model is a quantized copy of another, as its name says."""
    return _QUANTIZED.search(path) is not None


def plain_name(path: str) -> str:
    """Return the last part of a model's name, which quantized copies and mirrors of it share."""
    name = re.split(r"[/\\]", (hub_id(path) or path).rstrip("/\\"))[-1]
    # Mirrors of Llama leave Meta out.
    return re.sub("^meta-(?=llama)", "", _QUANTIZED.sub("", name).lower())
