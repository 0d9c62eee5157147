"""A weight whose mask has an entry for each of its entries, where the fusion is linear.

Both passes over it go through pieces that fit the processor's cache. Noise and mask are computed
there and not stored, and nothing as large as the weight is allocated. On a GPU, kernels of our own
do the same, where they can be used.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..masking import mask_scale
from ..pieces import pieces
from ..shards import Shard
from ..weights import LinearWeight
from .draws import Draw, Mask
from .optimizer import step_logits
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


def update_logits(
    weight: Tensor,
    gradient: Tensor,
    merged: LinearWeight,
    draw: Draw,
    rescale: str,
    shard: Shard,
    rate: float,
) -> Tensor:
    """Take the optimiser's step on the logits of ``draw``, in place: see ``optimizer.step_logits``.

    Args:
        weight, gradient, merged, draw, rescale, shard: see ``logit_gradients``.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the logits' gradient, see there.
    """
    kernels = kernels_for(weight.device)
    if kernels:
        found: Tensor = kernels.update_logits(gradient, merged.fused, draw, rescale, shard, rate)
        return found
    return step_logits(
        draw.logits, logit_gradients(weight, gradient, merged, draw, rescale, shard), rate
    )


def logit_gradients(
    weight: Tensor,
    gradient: Tensor,
    merged: LinearWeight,
    draw: Draw,
    rescale: str,
    shard: Shard,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield dL/dx piece by piece, float32: the formula is that of ``masking.logit_gradient``.

    Args:
        weight: its storage is used: what it held is lost.
        gradient: dL/dW in the weight's shape, complete; its storage is used likewise.
        merged: the weight as a function of the mask.
        draw: the sample that the weight was written with.
        rescale: see ``masking.mask_scale``.
        shard: the rows that are kept; sums are over the whole weight.
    """
    slopes, products = weight.view(-1), gradient.reshape(-1)
    fused = merged.fused.view(-1)
    parts = pieces(len(slopes), slopes.device)
    # sum(G m) and sum(m), which every entry's gradient depends on.
    weighted, total = (torch.zeros((), device=slopes.device) for _ in range(2))
    for part in parts:
        mask = draw.part(part)
        product = products[part].float().mul_(fused[part])
        slope = torch.addcmul(mask, mask, mask, value=-1)
        if rescale == "none":
            yield part, product.mul_(slope).div_(draw.temperature)
            continue
        weighted += torch.dot(product, mask)
        total += mask.sum()
        products[part], slopes[part] = product.mul_(slope), slope
    if rescale == "none":
        return
    weighted, total = shard.add_up(torch.stack([weighted, total]))
    scale = mask_scale(total.double() / shard.entries, rescale)
    common = float(weighted * scale * scale / shard.entries)
    for part in parts:
        own = products[part].float().mul_(scale)
        yield part, own.sub_(slopes[part], alpha=common).div_(draw.temperature)
