"""A mask that is drawn whole: it has few entries, or its fusion is no sum.

On a GPU, kernels of our own do what torch does in many small calls, where they can be used.
"""

import torch
from torch import Tensor

from ..common.chunks import pieces
from .draws import Draw, Mask
from .triton_check import kernels_for


def whole_mask(draw: Mask, count: int, device: torch.device) -> Tensor:
    """Return all ``count`` entries of a mask, float32, (count,)."""
    kernels = kernels_for(device) if isinstance(draw, Draw) else None
    if kernels:
        found: Tensor = kernels.whole_mask(draw)
        return found
    return torch.cat([draw.part(part) for part in pieces(count, device)])
