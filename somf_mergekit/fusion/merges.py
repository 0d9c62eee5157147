"""One weight of the merge as a function of the mask's factor: W(c) and its gradient dL/dc.

The factor c, one value per mask entry, is what the mask multiplies task vectors with, see
``masking.mask_factor``. Where the fusion is linear in it, W(c) = start + D c; else autograd goes
through the fusion.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from ..common.chunks import pieces, row_blocks
from ..mask.granularity import Layout
from ..mask.masking import MaskSampler, mask_scale
from .fuse import SUMS, fused, is_linear, masked_group, with_tensors
from .groups import as_type
from .shards import Shard

Rows = slice | EllipsisType
# Puts a tensor somewhere else: on a device, or in a file.
Move = Callable[[Tensor], Tensor]
# Is shown task vectors, (models, rows, ...), and the rows' factor; may write over the former.
Watch = Callable[[Tensor, Tensor], object]

# Weights that add up to 1 do so up to float32's rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LinearMerge:
    """W(c) = start + D c: all task vectors are stored as one, however many models there are.

    Attributes:
        start: the merge of models that equal the base, in the weight's shape.
        delta: D, the fused task vector, in the weight's shape.
    """

    start: Tensor
    delta: Tensor

    def write(self, weight: Tensor, factor: Tensor) -> None:
        """Set ``weight`` to W(c), computed in float32; ``factor`` broadcasts to it."""
        factor = factor.expand(self.delta.shape)
        self._write(weight, lambda rows: factor[rows])

    def write_sampled(
        self, weight: Tensor, sampler: MaskSampler, rescale: str, shard: Shard
    ) -> None:
        """Set ``weight`` to W(c) for a mask with one entry a weight, which is never stored whole.

        Args:
            weight: the rows that this process has.
            sampler: the mask of these rows.
            rescale: see ``masking.mask_scale``; the mean is the whole mask's.
            shard: these rows.
        """
        total = torch.zeros((), device=weight.device)
        if rescale == "mean":
            for part in pieces(weight.numel(), weight.device):
                total += sampler.part(part).sum()
        scale = mask_scale(shard.add_up(total).double() / shard.entries, rescale)
        # The mask is drawn again rather than stored: in the weight's dtype it would be rounded.
        flat = LinearMerge(self.start.reshape(-1), self.delta.view(-1))
        flat._write(weight.view(-1), lambda part: sampler.part(part).mul_(scale))

    def _write(self, weight: Tensor, factor_of: Callable[[Any], Tensor]) -> None:
        for rows in row_blocks(self.delta):
            merged = (factor_of(rows) * self.delta[rows]).add_(self.start[rows])
            weight[rows] = as_type(merged, weight.dtype)

    def factor_gradient(
        self, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        """Return dL/dc, float32, one value per mask entry, from dL/dW at the weight W(c).

        Args:
            weight_gradient: in the shape of the rows that this process has.
            factor: c, one value per mask entry.
            layout: how the entries lie on the whole weight.
            shard: these rows.
        """
        # With one entry for all rows, the blocks add up; else each has entries of its own.
        expanded = torch.zeros(layout.expanded_shape, device=self.delta.device)
        own, in_all_rows = shard.own(expanded), expanded.shape[:1] == (1,)
        for rows in row_blocks(self.delta):
            product = weight_gradient[rows].float() * self.delta[rows]
            part = own if in_all_rows else own[rows]
            part += product.sum_to_size(part.shape)
        return layout.reduce(shard.add_up(expanded))

    def moved(self, move: Move) -> "LinearMerge":
        """Return the same with its tensors put where ``move`` puts them."""
        return LinearMerge(move(self.start), move(self.delta))


@dataclass(frozen=True)
class AutogradMerge:
    """W(c) by the fusion itself, differentiated by autograd; always of the whole weight.

    Methods are those of LinearMerge.

    Attributes:
        group: base and fine-tuned models, as loaded.
        values: the somf method's parameters for this tensor.
    """

    group: TensorGroup
    values: dict[str, Any]

    def write(self, weight: Tensor, factor: Tensor) -> None:
        """Set ``weight`` to W(c)."""
        weight.copy_(self._merged(factor))

    def factor_gradient(
        self, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        """Return dL/dc."""
        leaf = factor.detach().requires_grad_()
        with torch.enable_grad():
            weight = self._merged(layout.expand(leaf))
        (gradient,) = torch.autograd.grad(weight, leaf, weight_gradient.float(), allow_unused=True)
        return torch.zeros_like(leaf) if gradient is None else gradient

    def moved(self, move: Move) -> "AutogradMerge":
        """Return the same with its tensors put where ``move`` puts them."""
        return replace(self, group=with_tensors(self.group, lambda entry: move(entry.tensor)))

    def _merged(self, factor: Tensor) -> Tensor:
        return fused(masked_group(self.group, factor), self.values)


Merge = LinearMerge | AutogradMerge


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the merge.

    Attributes:
        name: in the merged checkpoint.
        shape: of the tensor.
        base: the base model's tensor, in the recipe's dtype, or this process' rows of it.
        merge: the merged weight as a function of the mask; None where the merge is the base's
            whatever the mask (also buffers of integers, or of infinity in every model).
        changed: whether any model differs from the base.
        parameters: the somf method's parameters as mergekit resolved them for this tensor.
        vocabulary_axis: the axis of tokens, if there is one.
        aliases: names of tensors that are tied to it and written alike.
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    merge: Merge | None
    changed: bool
    parameters: dict[str, Any]
    vocabulary_axis: int | None
    aliases: tuple[str, ...] = ()


def merge_of(group: TensorGroup, values: dict[str, Any]) -> Merge:
    """Return the merged weight of a group as a function of the mask's factor.

    Args:
        group: base and fine-tuned models.
        values: as in ``fuse.fused``.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    if not is_linear(values):
        return AutogradMerge(group, values)
    base = group.base.tensor
    if values["fusion"] in SUMS:
        total = _weighted_sum(group, values)
        delta = torch.empty(base.shape, device=base.device)
        for rows, _, vectors in _task_vectors(group):
            delta[rows] = total.delta(vectors)
        return LinearMerge(total.start(base), delta)
    exact = base.float()
    start = fused(with_tensors(group, lambda entry: exact), values)
    # What is linear in all of its inputs gives D when its base is zero.
    delta = fused(with_tensors(group, lambda entry: entry.tensor.float() - exact), values)
    return LinearMerge(base if torch.equal(start, exact) else start, delta)


def fused_masked(
    group: TensorGroup, factor: Tensor, values: dict[str, Any], watch: Watch | None = None
) -> Tensor:
    """Return the fusion of the masked models, computed in float32, in the base's dtype.

    Sums are taken in pieces that fit the processor's cache, with no float32 copies of whole
    tensors.

    Args:
        group: with a base; tensors in the weight's shape.
        factor: see ``masking.mask_factor``; broadcasts to the weight.
        values: as in ``fuse.fused``.
        watch: is shown the task vectors; changes no bit of the result.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    stored = group.base.tensor
    if values["fusion"] not in SUMS:
        if watch is not None:
            show_task_vectors(group, factor, watch)
        return as_type(fused(masked_group(group, factor), values), stored.dtype)
    total = _weighted_sum(group, values)
    result, factor = torch.empty_like(stored), factor.expand(stored.shape)
    for rows, base, vectors in _task_vectors(group):
        LinearMerge(total.start(base), total.delta(vectors)).write(result[rows], factor[rows])
        if watch is not None:
            watch(vectors, factor[rows])
    return result


def show_task_vectors(group: TensorGroup, factor: Tensor, watch: Watch) -> None:
    """Show a group's task vectors piece by piece.

    Args:
        group: base and fine-tuned models.
        factor: see ``masking.mask_factor``; broadcasts to the weight.
        watch: see ``Watch``.
    """
    factor = factor.expand(group.base.tensor.shape)
    for rows, _, vectors in _task_vectors(group):
        watch(vectors, factor[rows])


@dataclass(frozen=True)
class _WeightedSum:
    """A fusion of one group as a sum: W = a base + b1 delta1 + b2 delta2 ..., in all entries.

    Attributes:
        of_base: a.
        of_task_vectors: b, in the order of the group's fine-tuned models.
    """

    of_base: float
    of_task_vectors: Sequence[float]

    def start(self, base: Tensor) -> Tensor:
        """Return a base."""
        return base if self.of_base == 1 else base.float() * self.of_base

    def delta(self, vectors: Tensor) -> Tensor:
        """Return D, (rows, ...), of task vectors, (models, rows, ...)."""
        found = vectors.new_zeros(vectors.shape[1:])
        for vector, weight in zip(vectors, self.of_task_vectors, strict=True):
            found.add_(vector, alpha=weight)
        return found


def _weighted_sum(group: TensorGroup, values: Mapping[str, Any]) -> _WeightedSum:
    """Return the sum that a fusion of SUMS makes of a group: mergekit is asked once a tensor."""
    count = len(group.non_base)
    # Entry i is the sum of a base of 0 and models of which the i-th is 1; the last, of ones alone.
    units = iter(torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1))
    base = torch.zeros(count + 1)
    base[-1] = 1
    entries = tuple(
        TensorEntry(e.id, base if e.is_base else next(units), e.is_base) for e in group.entries
    )
    *of_task_vectors, of_base = fused(TensorGroup(entries, group.metadata), values).tolist()
    return _WeightedSum(1.0 if abs(of_base - 1) < _ROUNDING else of_base, of_task_vectors)


def _task_vectors(group: TensorGroup) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """Yield blocks of rows with the base's values (rows, ...) and task vectors (models, rows, ...).

    Both are float32, the task vectors a new tensor.
    """
    stored = group.base.tensor
    for rows in row_blocks(stored):
        base = stored[rows].float()
        vectors = torch.empty(len(group.non_base), *base.shape, device=base.device)
        for vector, entry in zip(vectors, group.non_base, strict=True):
            torch.sub(entry.tensor[rows].float(), base, out=vector)
        yield rows, base, vectors
