"""How the entries of a mask are stored: a probability in a byte, or in a bit whether it is kept.

A probability p is stored as code = ceil(256 p) - 1 and read as (code + 0.5) / 256: the error is at
most 1/512, and p > 0.5 holds after reading exactly where it held before. Of a packed mask one bit
tells whether p > 0.5, read as 1 or 0.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.chunks import pieces

LEVELS = 256


def encoded_probability(probability: Tensor) -> Tensor:
    """Return probabilities as uint8 codes in the same shape, on the CPU."""
    return _codes(probability).to("cpu", torch.uint8)


def stored_probability(probability: Tensor) -> Tensor:
    """Return probabilities as they are read again once they have been stored, float32."""
    return _codes(probability).add_(0.5).div_(LEVELS)


def decoded_probability(codes: Tensor) -> Tensor:
    """Return uint8 codes as float32 probabilities in the same shape."""
    found = torch.empty(codes.shape)
    flat, flat_codes = found.view(-1), codes.reshape(-1)
    for part in pieces(len(flat)):
        flat[part].copy_(flat_codes[part]).add_(0.5).div_(LEVELS)
    return found


def packed_bits(probability: Tensor) -> Tensor:
    """Return whether each probability is above 0.5, eight of them in a byte, uint8, in a row."""
    return torch.from_numpy(np.packbits((probability > 0.5).view(-1).numpy()))


def unpacked_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bits of ``packed_bits`` as float32 probabilities, 1 or 0, in ``shape``."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits).view(tuple(shape)).float()


def level_counts(codes: Tensor) -> Tensor:
    """Return how many codes there are of each, (256,)."""
    # Counted as the bytes they are: much faster than as floats.
    return torch.bincount(codes.flatten(), minlength=LEVELS)


def bit_counts(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return how many packed entries are 0, in the first of 256 places, and 1, in the last."""
    counts = torch.zeros(LEVELS, dtype=torch.long)
    kept = int(np.unpackbits(packed.numpy()).sum())
    counts[-1], counts[0] = kept, math.prod(shape) - kept
    return counts


def _codes(probability: Tensor) -> Tensor:
    return torch.ceil(probability.float() * LEVELS).sub_(1).clamp_(0, LEVELS - 1)
