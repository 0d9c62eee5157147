"""Whether the Triton kernels can be used: where not, torch does the same, slower."""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click
import torch

from ..common.errors import first_line
from ..fusion.merges import LinearMerge
from ..fusion.shards import Shard
from ..mask.masking import MaskSampler
from ..mask.noise import noise_key, uniform_noise
from .optimizer import FactorGradient, logit_gradient, signsgd_step

# Of the tensor they are tried on: several programs, the last one not full.
_ENTRIES = 2051
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
    start, delta, gradient, logits = values
    merge, shard, room = LinearMerge(start, (delta,)), Shard((_ENTRIES,)), torch.empty_like(start)
    key = noise_key(seed=0, step=0, name="")
    samplers = [MaskSampler(logits.clone(), 0.5, key) for _ in range(3)]
    expected, of_weight, of_factor = samplers
    # A mask that is drawn whole has the gradient of its factor.
    given = FactorGradient(gradient * delta, None, of_factor, "mean", shard, room)
    kernels.update_logits(given, _RATE)
    written, weight = torch.empty_like(start), torch.empty_like(start)
    merge.write_sampled(written, [expected], "mean", shard)
    kernels.write_sampled(merge, weight, of_weight, "mean", shard)
    apart = [weight - written, kernels.whole_mask(of_weight) - expected.whole()]
    square = kernels.update_logits(
        FactorGradient(gradient, delta, of_weight, "mean", shard, room), _RATE
    )
    found = logit_gradient(FactorGradient(gradient, delta, expected, "mean", shard, room))
    is_clear = torch.cat([g.abs() for _, g, _ in found.parts()]) > _CLEAR
    apart.append(square / signsgd_step(expected.logits, found, _RATE) - 1)
    apart += [(own.logits - expected.logits)[is_clear] for own in (of_weight, of_factor)]
    return max(float(error.abs().max()) for error in apart)
