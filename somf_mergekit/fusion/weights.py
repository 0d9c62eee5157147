"""One weight of the merge as a function of what the mask multiplies its task vectors with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from ..common.chunks import row_blocks
from ..mask.granularity import Layout
from .fuse import SUMS, fused, fused_bases, fused_differences, is_linear, masked_group, with_tensors
from .groups import as_type
from .shards import Shard
from .sums import Watch, show_task_vectors, weighted_sum

# Puts a tensor where an engine has it: on a device, or in a file.
Keep = Callable[[Tensor], Tensor]


class MergedWeight(Protocol):
    """W(c), where c is the mask's factor (see ``masking.mask_factor``)."""

    def write(self, weight: Tensor, factor: Tensor) -> None:
        """Set ``weight`` to W(c), computed in float32; ``factor`` broadcasts to it."""

    def factor_gradient(
        self, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        """Return dL/dc, float32, one value per mask entry, from dL/dW at the weight W(c).

        Args:
            weight_gradient: in the shape of the rows that are kept.
            factor: c, one value per mask entry.
            layout: how the entries lie on the whole weight.
            shard: the rows that are kept.
        """

    def kept(self, keep: Keep, dtype: torch.dtype | None = None) -> "MergedWeight":
        """Return the same with its tensors put where ``keep`` puts them.

        A task vector that is kept as one is in ``dtype``, where that is given.
        """


@dataclass(frozen=True)
class LinearWeight:
    """W(c) = start + D c: all task vectors are kept as one, however many models there are.

    Attributes:
        start: the merge of models that equal the base, in the weight's shape.
        fused: D, the fused task vector, in the weight's shape.
    """

    start: Tensor
    fused: Tensor

    def write(self, weight: Tensor, factor: Tensor) -> None:
        """See MergedWeight."""
        factor = factor.expand(self.fused.shape)
        for rows in row_blocks(self.fused):
            weight[rows] = (factor[rows] * self.fused[rows]).add_(self.start[rows])

    def factor_gradient(
        self, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        """See MergedWeight."""
        # Of a tensor that has one entry in all rows, the blocks are summed; else laid together.
        spread = torch.zeros(layout.spread_shape, device=self.fused.device)
        own, in_all_rows = shard.own(spread), spread.shape[:1] == (1,)
        for rows in row_blocks(self.fused):
            product = weight_gradient[rows].float() * self.fused[rows]
            part = own if in_all_rows else own[rows]
            part += product.sum_to_size(part.shape)
        return layout.collected(shard.add_up(spread))

    def kept(self, keep: Keep, dtype: torch.dtype | None = None) -> "LinearWeight":
        """See MergedWeight."""
        return LinearWeight(keep(self.start), keep(self.fused.to(dtype) if dtype else self.fused))


@dataclass(frozen=True)
class FusedWeight:
    """W(c) by the fusion itself, differentiated by autograd; always of the whole weight.

    Attributes:
        group: base and fine-tuned models, as loaded.
        values: the somf method's parameters for this tensor.
    """

    group: TensorGroup
    values: dict[str, Any]

    def write(self, weight: Tensor, factor: Tensor) -> None:
        """See MergedWeight."""
        weight.copy_(self._merged(factor))

    def factor_gradient(
        self, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        """See MergedWeight."""
        leaf = factor.detach().requires_grad_()
        with torch.enable_grad():
            weight = self._merged(layout.spread(leaf))
        (gradient,) = torch.autograd.grad(weight, leaf, weight_gradient.float(), allow_unused=True)
        return torch.zeros_like(leaf) if gradient is None else gradient

    def kept(self, keep: Keep, dtype: torch.dtype | None = None) -> "FusedWeight":
        """See MergedWeight."""
        group = with_tensors(self.group, lambda entry: keep(entry.tensor))
        return FusedWeight(group, self.values)

    def _merged(self, factor: Tensor) -> Tensor:
        return fused(masked_group(self.group, factor), self.values)


def merged_weight(group: TensorGroup, values: dict[str, Any]) -> MergedWeight:
    """Return the merged weight of a group as a function of the mask's factor."""
    if not is_linear(values):
        return FusedWeight(group, values)
    base = group.base.tensor
    if values["fusion"] in SUMS:
        total = weighted_sum(group, values)
        start = base if total.of_base == 1 else base.float() * total.of_base
        return LinearWeight(start, total.whole_differences(group))
    start = fused_bases(group, values)
    start = base if torch.equal(start, base.float()) else start
    return LinearWeight(start, fused_differences(group, values))


def fused_masked(
    group: TensorGroup, factor: Tensor, values: dict[str, Any], watch: Watch | None = None
) -> Tensor:
    """Return the fusion of the masked models, computed in float32, in the base's dtype.

    Args:
        group: with a base; tensors in the weight's shape.
        factor: see ``masking.mask_factor``; broadcasts to the weight.
        values: as in ``fusions.fused``.
        watch: is shown the task vectors, see ``sums.Watch``.
    """
    if values["fusion"] in SUMS:
        return weighted_sum(group, values).masked(group, factor, watch)
    if watch is not None:
        show_task_vectors(group, factor, watch)
    return as_type(fused(masked_group(group, factor), values), group.base.tensor.dtype)
