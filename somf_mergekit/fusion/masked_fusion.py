"""What mergekit's methods make of masked models: to learn masks with, and to merge under them."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from ..common.chunks import row_blocks
from ..mask.granularity import product
from .fuse import SUMS, Factors, fused, in_order, is_linear, masked_group, with_tensors
from .groups import as_type
from .merges import AutogradMerge, Learned, LinearMerge, Merge, Rows, factor_rows

# Is shown task vectors, (models, rows, ...), and their factors, which broadcast to them; may write
# over the former.
Watch = Callable[[Tensor, Tensor], object]
# The models that share a factor, with it; it is empty where they have no mask.
_Sharing = Mapping[tuple[Hashable, ...], tuple[Tensor, ...]]

# Weights that add up to 1 do so up to float32's rounding.
_ROUNDING = 1e-6


def merge_of(
    group: TensorGroup,
    values: dict[str, Any],
    learned: Learned | None = None,
    given: Factors | None = None,
) -> Merge:
    """Return the merged weight of a group as a function of the factors of the masks to learn.

    Args:
        group: base and fine-tuned models.
        values: as in ``fuse.fused``.
        learned: the models of each mask that is learned; one mask is of all where not given.
        given: factors of models whose masks are not; others have none.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    models, given = tuple(entry.id for entry in group.non_base), given or {}
    learned = (models,) if learned is None else learned
    is_shared = learned == (models,)
    if not is_shared:
        group = in_order(group, values)
    if not is_linear(values, is_shared):
        return AutogradMerge(masked_group(group, given) if given else group, values, learned)
    base = group.base.tensor
    fixed = [model for model in models if not any(model in own for own in learned)]
    if values["fusion"] in SUMS:
        total = weighted_sum(group, values)
        start = total.start(base)
        start = start.to(torch.float32, copy=True) if fixed else start
        deltas = tuple(torch.empty(base.shape, device=base.device) for _ in learned)
        for rows, _, vectors in _task_vectors(group):
            for delta, own in zip(deltas, learned, strict=True):
                delta[rows] = total.delta(vectors, own)
            for model in fixed:
                change = total.delta(vectors, (model,))
                factor = factor_rows(given.get(model, ()), base.shape, rows)
                start[rows] += change if factor is None else change * factor
        return LinearMerge(start, deltas)
    exact, masked = base.float(), masked_group(group, given)
    start = fused(with_tensors(masked, lambda e: e.tensor if e.id in fixed else exact), values)

    def delta_of(own: Sequence[Hashable]) -> Tensor:
        # What is linear in all of its inputs gives D when its base is zero.
        zero = torch.zeros_like(exact)
        return fused(
            with_tensors(group, lambda e: e.tensor.float() - exact if e.id in own else zero), values
        )

    return LinearMerge(
        base if torch.equal(start, exact) else start, tuple(delta_of(own) for own in learned)
    )


def fused_masked(
    group: TensorGroup, factors: Factors, values: dict[str, Any], watch: Watch | None = None
) -> Tensor:
    """Return the fusion of the masked models, computed in float32, in the base's dtype.

    Sums are taken in pieces that fit the processor's cache, with no float32 copies of whole
    tensors.

    Args:
        group: with a base; tensors in the weight's shape.
        factors: see ``masking.mask_factor``.
        values: as in ``fuse.fused``.
        watch: is shown the task vectors; changes no bit of the result.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    stored, sharing = group.base.tensor, _sharing(group, factors)
    if len(sharing) > 1:
        group = in_order(group, values)
        sharing = _sharing(group, factors)
    if values["fusion"] not in SUMS or not factors:
        if watch is not None:
            show_task_vectors(group, factors, watch)
        return as_type(fused(masked_group(group, factors), values), stored.dtype)
    total, result = weighted_sum(group, values), torch.empty_like(stored)
    for rows, base, vectors in _task_vectors(group):
        deltas = tuple(total.delta(vectors, own) for own in sharing)
        own_rows = [[f.expand(stored.shape)[rows] for f in own] for own in sharing.values()]
        LinearMerge(total.start(base), deltas).write(result[rows], own_rows)
        if watch is not None:
            watch(vectors, _stacked(group, sharing, rows))
    return result


def show_task_vectors(group: TensorGroup, factors: Factors, watch: Watch) -> None:
    """Show a group's task vectors piece by piece.

    Args:
        group: base and fine-tuned models.
        factors: see ``masking.mask_factor``.
        watch: see ``Watch``.
    """
    sharing = _sharing(group, factors)
    for rows, _, vectors in _task_vectors(group):
        watch(vectors, _stacked(group, sharing, rows))


@dataclass(frozen=True)
class WeightedSum:
    """A fusion of one group as a sum: W = a base + b1 delta1 + b2 delta2 ..., in all entries.

    Attributes:
        of_base: a.
        of_task_vectors: b of each fine-tuned model, in the group's order.
    """

    of_base: float
    of_task_vectors: Mapping[Hashable, float]

    def start(self, base: Tensor) -> Tensor:
        """Return a base."""
        return base if self.of_base == 1 else base.float() * self.of_base

    def delta(self, vectors: Tensor, models: Sequence[Hashable]) -> Tensor:
        """Return D, (rows, ...), of the task vectors, (models, rows, ...), of some models."""
        found = vectors.new_zeros(vectors.shape[1:])
        for vector, (model, weight) in zip(vectors, self.of_task_vectors.items(), strict=True):
            if model in models:
                found.add_(vector, alpha=weight)
        return found


def weighted_sum(group: TensorGroup, values: Mapping[str, Any]) -> WeightedSum:
    """Return the sum that a fusion of SUMS makes of a group: mergekit is asked once a tensor."""
    count = len(group.non_base)
    # Entry i is the sum of a base of 0 and models of which the i-th is 1; the last, of ones alone.
    units = iter(torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1))
    base = torch.zeros(count + 1)
    base[-1] = 1
    entries = tuple(
        TensorEntry(e.id, base if e.is_base else next(units), e.is_base) for e in group.entries
    )
    *weights, of_base = fused(TensorGroup(entries, group.metadata), values).tolist()
    of_task_vectors = {e.id: weight for e, weight in zip(group.non_base, weights, strict=True)}
    return WeightedSum(1.0 if abs(of_base - 1) < _ROUNDING else of_base, of_task_vectors)


def _sharing(group: TensorGroup, factors: Factors) -> _Sharing:
    """Return the models that share a factor, with it; those without one share an empty one."""
    models: dict[int, list[Hashable]] = {}
    for entry in group.non_base:
        models.setdefault(id(factors.get(entry.id, ())), []).append(entry.id)
    return {tuple(own): factors.get(own[0], ()) for own in models.values()}


def _stacked(group: TensorGroup, sharing: _Sharing, rows: Rows) -> Tensor:
    """Return rows of the models' factors, which broadcast to (models, rows, ...)."""
    base = group.base.tensor
    unmasked = (torch.ones((), device=base.device),)
    found = {
        models: product([one.expand(base.shape)[rows] for one in factor or unmasked])
        for models, factor in sharing.items()
    }
    if len(found) == 1:
        return next(iter(found.values()))
    of_models = {model: factor for models, factor in found.items() for model in models}
    return torch.stack([of_models[entry.id] for entry in group.non_base])


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
