"""A weight whose mask has an entry for each of its entries, where the fusion is linear.

It is written in pieces that fit the processor's cache. Noise and mask are computed there and not
stored, and nothing as large as the weight is allocated. On a GPU, kernels of our own do the same,
where they can be used.
"""

import torch
from torch import Tensor

from ..common.chunks import pieces
from ..fusion.shards import Shard
from ..fusion.weights import LinearWeight
from ..mask.masking import mask_scale
from .draws import Draw, Mask
from .triton_check import kernels_for


def write_masked(
    weight: Tensor, merged: LinearWeight, draw: Mask, rescale: str, shard: Shard
) -> None:
    """Set ``weight`` to start + D m / mean(m), or start + D m for ``rescale`` none.

    Args:
        weight: the rows that are kept.
        merged: they as a function of the mask.
        draw: the mask.
        rescale: see ``masking.mask_scale``; the mean is the whole mask's.
        shard: the rows that are kept.
    """
    kernels = kernels_for(weight.device) if isinstance(draw, Draw) else None
    if kernels:
        kernels.write_masked(weight, merged, draw, rescale, shard)
        return
    flat, fused, start = weight.view(-1), merged.fused.view(-1), merged.start.reshape(-1)
    parts = pieces(len(flat), flat.device)
    total = torch.zeros((), device=flat.device)
    if rescale == "mean":
        for part in parts:
            total += draw.part(part).sum()
    scale = mask_scale(shard.add_up(total).double() / shard.entries, rescale)
    # The mask is drawn again rather than stored: in the weight's dtype it would be rounded.
    for part in parts:
        flat[part] = draw.part(part).mul_(scale).mul_(fused[part]).add_(start[part])
