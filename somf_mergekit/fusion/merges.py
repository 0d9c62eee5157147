"""One weight of the merge as a function of its masks' factors: W(c) and its gradient dL/dc.

A factor c, one value per mask entry, is what a mask multiplies task vectors with, see
``masking.mask_factor``. One mask is of all models, or each model has its own, or some have masks
that are given, and are not learned. Where the fusion is linear in the factors, W(c) = start + the
sum of each D c, where D may stay the product of two small matrices; else autograd goes through the
fusion.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from ..common.chunks import pieces, row_blocks
from ..mask.granularity import Layout, product
from ..mask.masking import MaskSampler, mask_scale
from .fuse import fused, masked_group, with_tensors
from .groups import as_type
from .shards import Shard

Rows = slice | EllipsisType
# Puts a tensor somewhere else: on a device, or in a file.
Move = Callable[[Tensor], Tensor]
# Ids of the models that each learned mask is of.
Learned = tuple[tuple[Hashable, ...], ...]


@dataclass(frozen=True)
class LinearMerge:
    """W(c) = start + the sum of each D c: models that share a mask have their task vectors as one.

    Attributes:
        start: the merge of learned models that equal the base, in the weight's shape.
        deltas: D, for each mask the fused task vectors of its models, in the weight's shape.
    """

    start: Tensor
    deltas: tuple[Tensor, ...]

    def write(self, weight: Tensor, factors: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Set ``weight`` to W(c), computed in float32.

        Args:
            weight: the rows that this process has.
            factors: for each mask, tensors whose product is c, and that broadcast to these rows;
                the merge without these masks, c = 1, where not given.
        """
        shape = self.start.shape
        factors = factors or [()] * len(self.deltas)
        self._write(weight, lambda number, rows: factor_rows(factors[number], shape, rows))

    def write_sampled(
        self, weight: Tensor, samplers: Sequence[MaskSampler], rescale: str, shard: Shard
    ) -> None:
        """Set ``weight`` to W(c) for masks with one entry a weight, which are never stored whole.

        Args:
            weight: the rows that this process has.
            samplers: the masks of these rows.
            rescale: see ``masking.mask_scale``; the mean is the whole mask's.
            shard: these rows.
        """
        scales = []
        for sampler in samplers:
            total = torch.zeros((), device=weight.device)
            if rescale == "mean":
                for part in pieces(weight.numel(), weight.device):
                    total += sampler.part(part).sum()
            scales.append(mask_scale(shard.add_up(total).double() / shard.entries, rescale))
        # A mask is drawn again rather than stored: in the weight's dtype it would be rounded.
        deltas = tuple(delta.view(-1) for delta in self.deltas)
        flat = LinearMerge(self.start.reshape(-1), deltas)
        flat._write(
            weight.view(-1), lambda number, part: samplers[number].part(part).mul_(scales[number])
        )

    def _write(self, weight: Tensor, factor_of: Callable[[int, Any], Tensor | None]) -> None:
        for rows in row_blocks(self.start):
            merged = None
            for number, delta in enumerate(self.deltas):
                factor, own = factor_of(number, rows), delta[rows]
                change = own.to(torch.float32, copy=True) if factor is None else factor * own
                merged = change if merged is None else merged.add_(change)
            start = self.start[rows]
            weight[rows] = as_type(start if merged is None else merged.add_(start), weight.dtype)

    def factor_gradients(
        self, weight_gradient: Tensor, factors: Sequence[Tensor], layout: Layout, shard: Shard
    ) -> list[Tensor]:
        """Return dL/dc of each mask, float32, one value per entry, from dL/dW at the weight W(c).

        Args:
            weight_gradient: in the shape of the rows that this process has.
            factors: c of each mask, one value per entry.
            layout: how the entries lie on the whole weight.
            shard: these rows.
        """
        return [
            self._factor_gradient(delta, weight_gradient, factor, layout, shard)
            for delta, factor in zip(self.deltas, factors, strict=True)
        ]

    def _factor_gradient(
        self, delta: Tensor, weight_gradient: Tensor, factor: Tensor, layout: Layout, shard: Shard
    ) -> Tensor:
        of_factors = [shard.own(own) for own in layout.expand_factors(factor)]
        parts = [part for _, part in layout.parts()]
        found = [torch.zeros(part.expanded_shape, device=delta.device) for part in parts]
        for rows in row_blocks(delta):
            change = weight_gradient[rows].float() * delta[rows]
            for number, expanded in enumerate(found):
                # With one entry for all rows, the blocks add up; else each has entries of its own.
                own, in_all_rows = shard.own(expanded), expanded.shape[:1] == (1,)
                part = own if in_all_rows else own[rows]
                rest = [*of_factors[:number], *of_factors[number + 1 :]]
                others = factor_rows(rest, delta.shape, rows)
                part += (change if others is None else change * others).sum_to_size(part.shape)
        reduced = [p.reduce(shard.add_up(one)) for p, one in zip(parts, found, strict=True)]
        return reduced[0] if not layout.factors else torch.cat([one.view(-1) for one in reduced])

    def moved(self, move: Move) -> "LinearMerge":
        """Return the same with its tensors put where ``move`` puts them."""
        return LinearMerge(move(self.start), tuple(map(move, self.deltas)))


@dataclass(frozen=True)
class AutogradMerge:
    """W(c) by the fusion itself, differentiated by autograd; always of the whole weight.

    Methods are those of LinearMerge.

    Attributes:
        group: base and fine-tuned models, as loaded, or under the masks that are given.
        values: the somf method's parameters for this tensor.
        learned: the models of each mask.
    """

    group: TensorGroup
    values: dict[str, Any]
    learned: Learned

    def write(self, weight: Tensor, factors: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Set ``weight`` to W(c)."""
        weight.copy_(self._merged(factors or [()] * len(self.learned)))

    def factor_gradients(
        self, weight_gradient: Tensor, factors: Sequence[Tensor], layout: Layout, shard: Shard
    ) -> list[Tensor]:
        """Return dL/dc of each mask."""
        leaves = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad():
            weight = self._merged([layout.expand_factors(leaf) for leaf in leaves])
        found = torch.autograd.grad(weight, leaves, weight_gradient.float(), allow_unused=True)
        return [
            torch.zeros_like(leaf) if own is None else own
            for leaf, own in zip(leaves, found, strict=True)
        ]

    def moved(self, move: Move) -> "AutogradMerge":
        """Return the same with its tensors put where ``move`` puts them."""
        return replace(self, group=with_tensors(self.group, lambda entry: move(entry.tensor)))

    def _merged(self, factors: Sequence[Sequence[Tensor]]) -> Tensor:
        of_models = {
            model: tuple(factor)
            for models, factor in zip(self.learned, factors, strict=True)
            for model in models
        }
        return fused(masked_group(self.group, of_models), self.values)


class LowRank(NamedTuple):
    """A task vector as an adapter stores it: up @ down, (out, rank) by (rank, in)."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class FactoredMerge:
    """W(c) = W0 + the sum of each (up @ down) c, as what a layer adds to W0; always whole.

    Methods are those of LinearMerge, but that ``weight`` is not W: it has the numbers of one matrix
    (rank, in), then those of one (out, rank), whose product is W(c) - W0.

    Attributes:
        changes: of each mask; those of its models stand beside each other.
    """

    changes: tuple[LowRank, ...]

    @classmethod
    def of(
        cls,
        changes: Mapping[Hashable, LowRank],
        weights: Mapping[Hashable, float],
        learned: Learned,
        shape: tuple[int, ...],
    ) -> "FactoredMerge":
        """Return the merge of models that change a weight in this way.

        Args:
            changes: of the models that do, float32.
            weights: what the fusion multiplies each model's task vector with.
            learned: the models of each mask.
            shape: of the weight, (out, in).
        """
        none = LowRank(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))
        found = []
        for models in learned:
            own = [none, *(changes[m] for m in models if m in changes)]
            scales = [1.0, *(weights[m] for m in models if m in changes)]
            ups = [change.up * scale for change, scale in zip(own, scales, strict=True)]
            found.append(LowRank(torch.cat([change.down for change in own]), torch.cat(ups, 1)))
        return cls(tuple(found))

    @property
    def size(self) -> int:
        """How many numbers ``write`` sets."""
        return sum(change.down.numel() + change.up.numel() for change in self.changes)

    def parts(self, weight: Tensor) -> LowRank:
        """Return the two matrices that ``write`` sets, as views."""
        rank = sum(len(change.down) for change in self.changes)
        down, up = weight.tensor_split([rank * self.changes[0].down.shape[1]])
        return LowRank(down.view(rank, -1), up.view(-1, rank))

    def write(self, weight: Tensor, factors: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Set ``weight`` to the two matrices under the masks."""
        weight.copy_(self._under(factors or [()] * len(self.changes)))

    def factor_gradients(
        self, weight_gradient: Tensor, factors: Sequence[Tensor], layout: Layout, shard: Shard
    ) -> list[Tensor]:
        """Return dL/dc of each mask."""
        leaves = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad():
            weight = self._under([layout.expand_factors(leaf) for leaf in leaves])
        return list(torch.autograd.grad(weight, leaves, weight_gradient))

    def moved(self, move: Move) -> "FactoredMerge":
        """Return the same with its tensors put where ``move`` puts them."""
        return FactoredMerge(tuple(LowRank(*map(move, change)) for change in self.changes))

    def _under(self, factors: Sequence[Sequence[Tensor]]) -> Tensor:
        downs, ups = [], []
        for (down, up), factor in zip(self.changes, factors, strict=True):
            for own in factor:
                # One entry an input column, or one an output row.
                down, up = (down * own, up) if len(own) == 1 else (down, up * own)
            downs.append(down)
            ups.append(up)
        return torch.cat([torch.cat(downs).flatten(), torch.cat(ups, 1).flatten()])


Merge = LinearMerge | AutogradMerge | FactoredMerge


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the merge.

    Attributes:
        name: in the merged checkpoint.
        shape: of the tensor.
        base: the base model's tensor, in the recipe's dtype, or this process' rows of it.
        merge: the merged weight as a function of the masks; None where the merge is the base's
            whatever the mask (also buffers of integers, or of infinity in every model).
        learned: the models of each mask that is learned.
        changed: whether any model differs from the base.
        parameters: the somf method's parameters as mergekit resolved them for this tensor.
        vocabulary_axis: the axis of tokens, if there is one.
        aliases: names of tensors that are tied to it and written alike.
        starts: for each mask what gives the logits that it starts from, or None.
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    merge: Merge | None
    learned: Learned
    changed: bool
    parameters: dict[str, Any]
    vocabulary_axis: int | None
    aliases: tuple[str, ...] = ()
    starts: tuple[Callable[[], Tensor] | None, ...] = ()


def factor_rows(factor: Sequence[Tensor], shape: Sequence[int], rows: Rows) -> Tensor | None:
    """Return rows of the product of tensors that broadcast to a shape; None where there is none."""
    return product([one.expand(shape)[rows] for one in factor]) if factor else None
