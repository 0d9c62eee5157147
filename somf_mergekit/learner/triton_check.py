"""Whether the Triton kernels can be used: where not, torch does the same, slower."""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click
import torch

from ..common.errors import first_line
from ..fusion.shards import Shard
from ..fusion.weights import LinearWeight
from ..mask.masking import concrete_sample, mask_factor
from ..mask.noise import noise_key, uniform_noise
from .draws import Draw
from .optimizer import logit_gradient, signsgd_step

# Of the tensor they are tried on: several programs, the last one not full.
_ENTRIES = 2051
_TEMPERATURE = 0.5
_RATE = 1.0
# A gradient below this is about 0, and its sign may be another.
_CLEAR = 1e-5
_TOLERANCE = 1e-4


def kernels_for(device: torch.device) -> Any:
    """Return the module ``kernels`` where it works on a device, None where torch is to be used."""
    return _tried(device) if device.type == "cuda" else None


@lru_cache(maxsize=8)
def _tried(device: torch.device) -> Any:
    if not find_spec("triton"):
        return None
    # Triton compiles on first use, and needs a C compiler and a device that it knows.
    try:
        kernels = import_module(".kernels", __package__)
        error = largest_error(kernels, device)
    except Exception as failure:
        reason = first_line(failure)
    else:
        if error < _TOLERANCE:
            return kernels
        reason = f"it computes something else, by {error:.1e}"
    click.echo(
        f"somf: Triton can't be used on {device} ({reason}): torch computes the masks, which takes "
        "longer.",
        err=True,
    )
    return None


def largest_error(kernels: Any, device: torch.device) -> float:
    """Return how far the kernels are from what torch computes, on a small tensor."""
    values = uniform_noise(1, 4 * _ENTRIES, device=device).view(4, _ENTRIES).sub(0.5)
    start, fused, gradient, logits = values
    merged, shard = LinearWeight(start, fused), Shard((_ENTRIES,))
    key = noise_key(seed=0, step=0, name="")
    sample = concrete_sample(logits, key, _TEMPERATURE)
    draw, weight = Draw(logits, key, 0, _TEMPERATURE), torch.empty_like(start)
    expected, room = logits.clone(), torch.empty_like(start)
    of_logits = logit_gradient(gradient.clone(), fused, room, draw, "mean", shard)
    square = signsgd_step(expected, of_logits, _RATE)
    is_clear = torch.cat([g.abs() for _, g, _ in of_logits.parts()]) > _CLEAR
    # A mask that is drawn whole has the gradient of its factor.
    other = Draw(logits.clone(), key, 0, _TEMPERATURE)
    kernels.update_logits(gradient * fused, None, other, "mean", shard, _RATE)
    kernels.write_masked(weight, merged, draw, "mean", shard)
    whole = kernels.whole_mask(draw)
    found = kernels.update_logits(gradient, fused, draw, "mean", shard, _RATE)
    errors = (
        weight - (start + fused * mask_factor(sample, "mean")),
        whole - sample,
        *((own.logits - expected)[is_clear] for own in (draw, other)),
        found / square - 1,
    )
    return max(float(error.abs().max()) for error in errors)
