"""One weight of the merge as a function of what the mask multiplies its task vectors with."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from .fusions import fused, is_linear, masked_group, with_tensors
from .granularity import Layout
from .masking import masked_task_vector


class MergedWeight(Protocol):
    """W(c), where c is the mask's factor (see ``masking.mask_factor``)."""

    def merged(self, factor: Tensor) -> Tensor:
        """Return W(c), float32 in the weight's shape; ``factor`` broadcasts to it."""

    def factor_gradient(self, weight_gradient: Tensor, factor: Tensor, layout: Layout) -> Tensor:
        """Return dL/dc, one value per mask entry, from dL/dW at the weight W(c).

        Args:
            weight_gradient: in the weight's shape.
            factor: c, one value per mask entry.
            layout: how the entries lie on the weight.
        """

    def to(self, device: torch.device | str) -> "MergedWeight":
        """Return the same on ``device``."""


@dataclass(frozen=True)
class LinearWeight:
    """W(c) = start + D c: all task vectors are kept as one, however many models there are.

    Attributes:
        start: the merge of models that equal the base, float32 or the base's own dtype.
        fused: D, the fused task vector, float32 in the weight's shape.
    """

    start: Tensor
    fused: Tensor

    def merged(self, factor: Tensor) -> Tensor:
        """See MergedWeight."""
        return masked_task_vector(self.fused, factor).add_(self.start)

    def factor_gradient(self, weight_gradient: Tensor, factor: Tensor, layout: Layout) -> Tensor:
        """See MergedWeight."""
        return layout.collected(weight_gradient.float() * self.fused)

    def to(self, device: torch.device | str) -> "LinearWeight":
        """See MergedWeight."""
        return LinearWeight(self.start.to(device), self.fused.to(device))


@dataclass(frozen=True)
class FusedWeight:
    """W(c) by the fusion itself, differentiated by autograd.

    Attributes:
        group: base and fine-tuned models, as loaded.
        values: the somf method's parameters for this tensor.
    """

    group: TensorGroup
    values: dict[str, Any]

    def merged(self, factor: Tensor) -> Tensor:
        """See MergedWeight."""
        return fused(masked_group(self.group, factor), self.values)

    def factor_gradient(self, weight_gradient: Tensor, factor: Tensor, layout: Layout) -> Tensor:
        """See MergedWeight."""
        leaf = factor.detach().requires_grad_()
        with torch.enable_grad():
            weight = self.merged(layout.spread(leaf))
        (gradient,) = torch.autograd.grad(weight, leaf, weight_gradient.float(), allow_unused=True)
        return torch.zeros_like(leaf) if gradient is None else gradient

    def to(self, device: torch.device | str) -> "FusedWeight":
        """See MergedWeight."""
        group = with_tensors(self.group, lambda entry: entry.tensor.to(device))
        return FusedWeight(group, self.values)


def merged_weight(group: TensorGroup, values: dict[str, Any]) -> MergedWeight:
    """Return the merged weight of a group as a function of the mask's factor."""
    if not is_linear(values):
        return FusedWeight(group, values)
    base = group.base.tensor
    start = fused(with_tensors(group, lambda entry: base.float()), values)
    if torch.equal(start, base.float()):
        start = base
    # What is linear in all of its inputs gives the fused task vector when its base is zero.
    difference = with_tensors(group, lambda entry: entry.tensor.float() - base.float())
    return LinearWeight(start, fused(difference, values))
