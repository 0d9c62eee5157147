"""What a weight's mask is drawn from: nothing of it is stored."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..mask.format import stored_probability
from ..mask.masking import concrete_piece, merged_piece


class Mask(Protocol):
    """A mask, each part of which can be computed alone."""

    def part(self, part: slice) -> Tensor:
        """Return the mask of a part of the entries, float32."""


@dataclass(frozen=True)
class Draw:
    """The soft mask, or a concrete sample: what the kernels compute too.

    Attributes:
        logits: of the flattened mask, (count,); of a mask that starts with one logit throughout, an
            expanded tensor.
        key: of the noise, see ``noise.noise_key``; None for the soft mask.
        first: the number of the first of these entries in the flattened tensor.
        temperature: of a concrete sample.
    """

    logits: Tensor
    key: int | None
    first: int
    temperature: float

    def part(self, part: slice) -> Tensor:
        """See Mask."""
        if self.key is None:
            return torch.sigmoid(self.logits[part])
        return concrete_piece(
            self.logits[part], self.key, self.first + part.start, self.temperature
        )


@dataclass(frozen=True)
class MergedMask:
    """What ``masking.mask_from_probabilities`` makes of the mask once that has been stored.

    Attributes:
        drawn: the draw of a merge, of these logits.
        kind: see there.
    """

    drawn: Draw
    kind: str

    def part(self, part: slice) -> Tensor:
        """See Mask."""
        drawn = self.drawn
        assert drawn.key is not None
        probability = stored_probability(torch.sigmoid(drawn.logits[part]))
        return merged_piece(
            probability, self.kind, drawn.key, drawn.first + part.start, drawn.temperature
        )
