"""What a model's weights are in each pass of learning, and what a weight is made of."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ..fusion.merges import Merge, Move


class Content(Enum):
    """What a model's weights are."""

    BASE = "the base model's"
    UNMASKED = "those of the plain merge"
    SOFT = "the merge under the present soft mask"
    SAMPLE = "the merge under the concrete sample of a step"
    UNTRAINED_SAMPLE = "the merge under a sample, of its own, of the mask's start"
    MERGED = "the merge under the present mask, stored and used as a merge does"


@dataclass(frozen=True)
class State:
    """What a model's weights are, of a step where that matters."""

    content: Content
    step: int = 0

    @property
    def of_fixed(self) -> Content:
        """What weights without a mask are."""
        return Content.BASE if self.content is Content.BASE else Content.UNMASKED


@dataclass(frozen=True)
class Learned:
    """What a step changes of one mask: that of one model, or of all.

    Attributes:
        logits: float32, one per entry, learned in place.
        moments: AdamW's means of earlier gradients, (2, *shape of the logits), float32; None under
            signSGD, which has none.
    """

    logits: Tensor
    moments: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.logits, *([] if self.moments is None else [self.moments])]

    def moved(self, move: Move) -> "Learned":
        """Return the same with each tensor put where ``move`` puts it."""
        return Learned(*map(move, self.tensors))


@dataclass(frozen=True)
class Parts:
    """What a weight is made of: the rows that this process has, or a copy on another device.

    Attributes:
        base: the base model's tensor.
        merge: the merged weight as a function of the masks' factors; None where it is the base's.
        masks: those that are learned, one or one for each model; none where the weight has none.
    """

    base: Tensor
    merge: Merge | None
    masks: tuple[Learned, ...] = ()

    @property
    def learned(self) -> list[Tensor]:
        """What a step changes."""
        return [tensor for mask in self.masks for tensor in mask.tensors]

    def moved(self, move: Move) -> "Parts":
        """Return the same with each tensor put where ``move`` puts it."""
        base = move(self.base)
        # A merge has the base too, most often.
        merge = self.merge and self.merge.moved(lambda t: base if t is self.base else move(t))
        return Parts(base, merge, tuple(mask.moved(move) for mask in self.masks))
