"""What a weight's mask is drawn from: nothing of it is stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking import concrete_piece


@dataclass(frozen=True)
class Draw:
    """A mask, each part of which can be computed alone.

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
        """Return the mask of a part of these entries, float32."""
        if self.key is None:
            return torch.sigmoid(self.logits[part])
        return concrete_piece(
            self.logits[part], self.key, self.first + part.start, self.temperature
        )
