"""What a weight's mask is drawn from: nothing of it is stored."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..mask_codes import stored_probability
from ..masking import concrete_piece, logit_of


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
        drawn: the sample of a merge, of these logits.
        kind: see there.
    """

    drawn: Draw
    kind: str

    def part(self, part: slice) -> Tensor:
        """See Mask."""
        probability = stored_probability(torch.sigmoid(self.drawn.logits[part]))
        if self.kind != "sampled":
            return (probability > 0.5).float() if self.kind == "binary" else probability
        first = self.drawn.first + part.start
        stored = replace(self.drawn, logits=logit_of(probability), first=first)
        return stored.part(slice(0, len(probability)))
