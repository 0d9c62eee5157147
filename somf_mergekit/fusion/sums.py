"""Fusions that are sums: W = a base + c1 delta1 + c2 delta2 ..., the same a and c for all entries.

What a and c are is mergekit's to say; it is asked once a tensor. Entry by entry the sum is taken
here, in pieces that fit the processor's cache, with no float32 copies of whole tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from ..common.chunks import row_blocks
from .fuse import fused
from .groups import as_type

# Is shown task vectors, (models, rows, ...), and the rows' factor; may write over the former.
Watch = Callable[[Tensor, Tensor], object]

# Weights that add up to 1 do so up to float32's rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WeightedSum:
    """A fusion of one group as a sum.

    Attributes:
        of_base: a.
        of_task_vectors: c, in the order of the group's fine-tuned models.
    """

    of_base: float
    of_task_vectors: tuple[float, ...]

    def differences(self, group: TensorGroup, base: Tensor, rows: slice | EllipsisType) -> Tensor:
        """Return D = sum of c delta for some rows, a new float32 tensor.

        Args:
            group: base and fine-tuned models.
            base: these rows of the base's tensor, float32.
            rows: of the group's tensors.
        """
        return self._combined((e.tensor[rows].float() - base for e in group.non_base), base)

    def masked(self, group: TensorGroup, factor: Tensor, watch: Watch | None = None) -> Tensor:
        """Return a base + D * factor, computed in float32, in the base's shape and dtype.

        Args:
            group: base and fine-tuned models.
            factor: see ``masking.mask_factor``; broadcasts to the weight.
            watch: is shown the task vectors while they are there; changes no bit of the result.
        """
        stored = group.base.tensor
        result, factor = torch.empty_like(stored), factor.expand(stored.shape)
        for rows in row_blocks(stored):
            base = stored[rows].float()
            if watch is None:
                difference = self.differences(group, base, rows)
            else:
                vectors = task_vectors(group, base, rows)
                difference = self._combined(vectors, base)
                watch(vectors, factor[rows])
            difference.mul_(factor[rows])
            result[rows] = as_type(difference.add_(base, alpha=self.of_base), stored.dtype)
        return result

    def whole_differences(self, group: TensorGroup) -> Tensor:
        """Return D, float32 in the base's shape."""
        stored = group.base.tensor
        result = torch.empty(stored.shape, device=stored.device)
        for rows in row_blocks(stored):
            result[rows] = self.differences(group, stored[rows].float(), rows)
        return result

    def _combined(self, vectors: Iterable[Tensor], base: Tensor) -> Tensor:
        found = torch.zeros_like(base)
        for vector, share in zip(vectors, self.of_task_vectors, strict=True):
            found.add_(vector, alpha=share)
        return found


def task_vectors(group: TensorGroup, base: Tensor, rows: slice | EllipsisType) -> Tensor:
    """Return the task vectors of some rows, a new float32 tensor of (models, rows, ...).

    Args:
        group: base and fine-tuned models.
        base: these rows of the base's tensor, float32.
        rows: of the group's tensors.
    """
    found = torch.empty(len(group.non_base), *base.shape, device=base.device)
    for vector, entry in zip(found, group.non_base, strict=True):
        torch.sub(entry.tensor[rows].float(), base, out=vector)
    return found


def show_task_vectors(group: TensorGroup, factor: Tensor, watch: Watch) -> None:
    """Show a group's task vectors piece by piece.

    Args:
        group: base and fine-tuned models.
        factor: see ``masking.mask_factor``; broadcasts to the weight.
        watch: see ``Watch``.
    """
    stored = group.base.tensor
    factor = factor.expand(stored.shape)
    for rows in row_blocks(stored):
        watch(task_vectors(group, stored[rows].float(), rows), factor[rows])


def weighted_sum(group: TensorGroup, values: Mapping[str, Any]) -> WeightedSum:
    """Return the sum that a fusion of ``fusions.SUMS`` makes of a group.

    Args:
        group: base and fine-tuned models.
        values: as in ``fusions.fused``.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    count = len(group.non_base)
    # Entry i is the sum of a base of 0 and models of which the i-th is 1; the last, of ones alone.
    units = torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1)
    base = torch.zeros(count + 1)
    base[-1] = 1
    tensors = iter(units)
    entries = tuple(
        TensorEntry(e.id, base if e.is_base else next(tensors), e.is_base) for e in group.entries
    )
    *of_task_vectors, of_base = fused(TensorGroup(entries, group.metadata), values).tolist()
    whole = abs(of_base - 1) < _ROUNDING
    return WeightedSum(1.0 if whole else of_base, tuple(of_task_vectors))
