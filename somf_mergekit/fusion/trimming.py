"""TIES' trim: of each task vector, the entries of the largest magnitude stay (arXiv 2306.01708).

mergekit sorts whole task vectors for it, which takes most of the time where a mask is learned: each
step trims anew. A threshold gives the same at a fraction.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

TRIMMING = ("ties",)


def trimmed(
    group: TensorGroup, arguments: Mapping[str, Any]
) -> tuple[TensorGroup, Mapping[str, Any]]:
    """Return the group with trimmed task vectors, and arguments that ask for no more trimming.

    Where trimmed task vectors are to be rescaled it is left to mergekit. The entries that are kept
    are as many; which of equal ones at the threshold may differ, as mergekit's sort leaves open.

    Args:
        group: with a base; float32.
        arguments: of a method of TRIMMING.
    """
    densities = arguments.get("density")
    if not densities or arguments.get("rescale"):
        return group, arguments
    base = group.base.tensor

    def entry(given: TensorEntry) -> TensorEntry:
        density = 1.0 if given.is_base else densities[given.id]
        if not 0 < density < 1 or given.tensor.numel() == 0:
            return given
        kept = largest((given.tensor - base).detach(), density)
        return TensorEntry(given.id, torch.where(kept, given.tensor, base), given.is_base)

    entries = tuple(map(entry, group.entries))
    whole = {model: 1.0 if density > 0 else density for model, density in densities.items()}
    return TensorGroup(entries, group.metadata), {**arguments, "density": whole}


def largest(values: Tensor, density: float) -> Tensor:
    """Return which entries have the largest magnitude, bool in the shape of ``values``.

    Args:
        values: float32; NaN counts as the largest.
        density: their share, rounded down to whole entries, at least one.
    """
    sizes = values.abs().flatten()
    count = max(1, int(density * len(sizes)))
    threshold = _ordered(sizes, len(sizes) - count)
    kept = ~(sizes <= threshold)
    equal = (sizes == threshold).nonzero().flatten()
    kept[equal[: count - int(kept.sum())]] = True
    return kept.view(values.shape)


def _ordered(sizes: Tensor, place: int) -> float:
    """Return the value that would stand at a place if the sizes were sorted."""
    if sizes.device.type == "cpu":
        # A fraction of the time of torch's kthvalue.
        return float(np.partition(sizes.numpy(), place)[place])
    return float(sizes.kthvalue(place + 1).values)
