"""The noise of a mask's samples: one number for each entry, computed wherever it is needed.

Entry e of a tensor gets 16 bits of the SplitMix64 sequence (Steele, Lea, Flood, OOPSLA 2014, whose
finaliser is Stafford's mix 13) that starts at the tensor's key: lane e % 4 of word e // 4. So any
part of a tensor can be drawn alone, on any device, with the same result, and none is stored.
"""

import hashlib
import math

import torch
from torch import Tensor

_LANES = 4
_GOLDEN = 0x9E3779B97F4A7C15
# Shift right, combine by exclusive or, multiply; the last does not multiply.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def noise_key(*, seed: int, step: int, name: str) -> int:
    """Return the key of a tensor's noise at an optimiser step, a signed 64-bit number."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform_noise(
    key: int, count: int, *, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return u ~ U(0, 1) of the entries ``start`` to ``start + count``, float32 (count,).

    It is a multiple of 2^-16 plus 2^-17: no value is 0 or 1, and no probability is off by more
    than 2^-17.
    """
    first, end = start // _LANES, math.ceil((start + count) / _LANES)
    words = torch.arange(first + 1, end + 1, dtype=torch.int64, device=device)
    words.mul_(_signed(_GOLDEN)).add_(key)
    for shift, factor in _ROUNDS:
        # Integers are signed here: the shift's copies of the sign are taken away.
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            words.mul_(_signed(factor))
    skipped = start - _LANES * first
    bits = words.view(torch.int16)[skipped : skipped + count]
    return bits.float().mul_(2.0**-16).add_(0.5 + 2.0**-17)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
