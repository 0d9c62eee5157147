"""A mask that is drawn whole: it has few entries, or its fusion is no sum.

On a GPU, kernels of our own do what torch does in many small calls, where they can be used.
"""

import torch
from torch import Tensor

from ..masking import logit_gradient
from ..pieces import pieces
from ..shards import Shard
from .draws import Draw, Mask
from .optimizer import step_logits
from .triton_check import kernels_for


def whole_mask(draw: Mask, count: int, device: torch.device) -> Tensor:
    """Return all ``count`` entries of a mask, float32, (count,)."""
    kernels = kernels_for(device) if isinstance(draw, Draw) else None
    if kernels:
        found: Tensor = kernels.whole_mask(draw)
        return found
    return torch.cat([draw.part(part) for part in pieces(count, device)])


def update_entries(
    of_factor: Tensor, sample: Tensor, draw: Draw, rescale: str, rate: float
) -> Tensor:
    """Take the optimiser's step on the logits of ``draw``, in place: see ``optimizer.step_logits``.

    Args:
        of_factor: dL/dc of each entry, float32.
        sample: the mask that ``draw`` gives, likewise.
        draw: what the weight was written with.
        rescale: see ``masking.mask_scale``.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the logits' gradient, see there.
    """
    kernels = kernels_for(sample.device)
    if kernels:
        shard = Shard(tuple(sample.shape))
        found: Tensor = kernels.update_logits(of_factor, None, draw, rescale, shard, rate)
        return found
    gradient = logit_gradient(of_factor, sample, draw.temperature, rescale)
    return step_logits(draw.logits, [(slice(None), gradient.view(-1))], rate)
