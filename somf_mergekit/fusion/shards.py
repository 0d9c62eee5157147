"""What a process has of a weight's state, where a shard group shares it: some of its rows."""

import math
from dataclasses import dataclass, field

import torch.distributed as distributed
from torch import Tensor

from ..common.process_group import ALONE, Processes


@dataclass(frozen=True)
class Shard:
    """This process' rows of one weight, places on its first axis, as FSDP deals them out.

    Every process has as many, but for the last ones, which may have fewer or none. A weight that is
    not shared, or has no axis, is a shard of one.

    Attributes:
        shape: of the whole weight.
        process_group: the processes that share it.
    """

    shape: tuple[int, ...]
    process_group: Processes = field(default=ALONE)

    @property
    def is_whole(self) -> bool:
        """Whether this process has all rows."""
        return self.process_group.count == 1 or not self.shape

    @property
    def rows(self) -> slice:
        """The rows that this process has."""
        if self.is_whole:
            return slice(0, self.shape[0] if self.shape else 1)
        start = self.process_group.rank * self._dealt
        return slice(min(start, self.shape[0]), min(start + self._dealt, self.shape[0]))

    @property
    def first_entry(self) -> int:
        """The first entry that this process has, in the flattened weight."""
        return self.rows.start * math.prod(self.shape[1:])

    @property
    def entries(self) -> int:
        """How many entries the whole weight has."""
        return math.prod(self.shape)

    def own(self, tensor: Tensor) -> Tensor:
        """Return this process' rows of a tensor that broadcasts to the weight: a view."""
        spans = tensor.dim() == len(self.shape) and tensor.shape[:1] == self.shape[:1]
        return tensor if self.is_whole or not spans else tensor[self.rows]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of this process' rows."""
        return (self.rows.stop - self.rows.start, *self.shape[1:]) if self.shape else ()

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes that share the weight, float32."""
        return tensor.float() if self.is_whole else self.process_group.add_up(tensor)

    def gather(self, weight: Tensor) -> None:
        """Fill in the other processes' rows of a weight that has this one's."""
        if self.is_whole:
            return
        own = weight[self.rows]
        if self._is_even and weight.is_contiguous():
            # Older releases of torch write in a thread where a leaf may not be written.
            _gather(weight.detach(), own.clone())
            return
        whole = self._padded(weight)
        dealt = whole.new_zeros((self._dealt, *self.shape[1:]))
        dealt[: len(own)] = own
        _gather(whole, dealt)
        weight.copy_(whole[: self.shape[0]])

    def own_sum(self, gradient: Tensor) -> Tensor:
        """Return this process' rows of the sum of all processes' gradients.

        The sum is taken in float32, and given in the gradient's dtype.
        """
        if self.is_whole:
            return gradient
        summand = gradient.float()
        if not self._is_even:
            padded = self._padded(summand).zero_()
            padded[: self.shape[0]] = summand
            summand = padded
        found = summand.new_empty((self._dealt, *self.shape[1:]))
        _scatter(found, summand.contiguous())
        return found[: self.own_shape[0]].to(gradient.dtype)

    @property
    def _dealt(self) -> int:
        return math.ceil(self.shape[0] / self.process_group.count)

    @property
    def _is_even(self) -> bool:
        return self.shape[0] % self.process_group.count == 0

    def _padded(self, like: Tensor) -> Tensor:
        return like.new_empty((self._dealt * self.process_group.count, *self.shape[1:]))


def _gather(whole: Tensor, own: Tensor) -> None:
    # The names from torch 2.13 on, and those before.
    named = getattr(distributed, "all_gather_single", None)
    (named or distributed.all_gather_into_tensor)(whole, own)


def _scatter(own: Tensor, whole: Tensor) -> None:
    named = getattr(distributed, "reduce_scatter_single", None)
    (named or distributed.reduce_scatter_tensor)(own, whole)
