"""Tensors in groups that a reader knows: by their layer and by their kind."""

import re
from collections.abc import Iterable

_LAYER = re.compile(r"\.(\d+)\.")
NO_LAYER = "other"


def layer_of(name: str) -> str:
    """Return the layer number in a tensor's name, ``other`` where there is none."""
    found = _LAYER.search(name)
    return found.group(1) if found else NO_LAYER


def kind_of(name: str) -> str:
    """Return a tensor's name without its layer: ``self_attn.q_proj`` for every layer's queries.

    Experts of a layer are of one kind.
    """
    found = _LAYER.search(name)
    rest = name[found.end() :] if found else name
    return re.sub(r"\.\d+\.", ".*.", rest).removesuffix(".weight")


def grouped(names: Iterable[str], key: str) -> dict[str, list[str]]:
    """Return names by their ``layer`` or ``kind``: layers in order, kinds as they come."""
    group_of = {"layer": layer_of, "kind": kind_of}[key]
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        groups.setdefault(group_of(name), []).append(name)
    return groups if key == "kind" else {g: groups[g] for g in sorted(groups, key=_numbers_first)}


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _numbers_first(layer: str) -> tuple[bool, int]:
    return (False, int(layer)) if layer.isdigit() else (True, 0)
