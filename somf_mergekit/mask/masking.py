"""The mathematics of masks: pure functions on tensors.

A mask has the weight's shape or a coarser one that broadcasts to it. The formulas are those of
arXiv 2405.09055 (subspace-oriented model fusion) and arXiv 2312.06173 (concrete masks).
"""

import torch
from torch import Tensor

from ..common.chunks import pieces
from .noise import noise_key, uniform_noise

MASK_KINDS = ("soft", "binary", "sampled", "bernoulli")
RESCALES = ("mean", "none")
# The draw of a mask at merge time; optimiser steps count from 0.
MERGE_STEP = -1
# Keeps the logit of a probability finite (within +-13.8).
_PROBABILITY_EDGE = 1e-6


def concrete_sample(logits: Tensor, key: int, temperature: float) -> Tensor:
    """Return m = sigmoid((x + log u - log(1 - u)) / T) in the shape of ``logits``, float32.

    Args:
        logits: x.
        key: of the noise u, see ``noise.noise_key``.
        temperature: T.
    """
    sample = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    flat, entries = sample.view(-1), logits.reshape(-1)
    for part in pieces(len(flat), flat.device):
        flat[part] = concrete_piece(entries[part], key, part.start, temperature)
    return sample


def concrete_piece(logits: Tensor, key: int, start: int, temperature: float) -> Tensor:
    """Return the part of a concrete sample that belongs to a part of the logits.

    Args:
        logits: x of consecutive entries, (count,).
        key: as in ``concrete_sample``.
        start: the first of these entries, in the flattened tensor.
        temperature: T.
    """
    uniform = uniform_noise(key, len(logits), start=start, device=logits.device)
    # log((1 - u) / u) costs one logarithm, and 1 - u is exact.
    noise = (1 - uniform).div_(uniform).log_()
    return torch.sub(logits, noise, out=noise).div_(temperature).sigmoid_()


def logit_of(probability: Tensor) -> Tensor:
    """Return log(p / (1 - p)), finite also at p = 0 and p = 1."""
    return torch.logit(probability.float(), eps=_PROBABILITY_EDGE)


def mask_from_probabilities(
    probability: Tensor, kind: str, *, temperature: float, seed: int, name: str
) -> Tensor:
    """Return the mask that a merge uses, float32 in the shape of ``probability``.

    ``soft`` is the probability itself, ``binary`` is 1 where it is above 0.5. The others are one
    draw each, from the same noise, that depends on ``seed`` and ``name`` alone: ``sampled`` is a
    concrete one; ``bernoulli`` is 1 with the probability and else 0, at any temperature.

    Raises:
        ValueError: ``kind`` is none of MASK_KINDS.
    """
    if kind == "soft":
        return probability.float()
    mask = torch.empty(probability.shape, device=probability.device)
    flat, entries = mask.view(-1), probability.reshape(-1)
    key = noise_key(seed=seed, step=MERGE_STEP, name=name)
    for part in pieces(len(flat), flat.device):
        flat[part] = merged_piece(entries[part].float(), kind, key, part.start, temperature)
    return mask


def merged_piece(
    probability: Tensor, kind: str, key: int, start: int, temperature: float
) -> Tensor:
    """Return the part of the mask of ``mask_from_probabilities`` for a part of its entries.

    Args:
        probability: of consecutive entries, float32 (count,).
        kind: see there.
        key: of a draw's noise.
        start: the first of these entries, in the flattened tensor.
        temperature: of a concrete draw.

    Raises:
        ValueError: ``kind`` is none of MASK_KINDS.
    """
    if kind == "soft":
        return probability
    if kind == "binary":
        return (probability > 0.5).float()
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {kind!r}: expected one of {', '.join(MASK_KINDS)}")
    drawn = concrete_piece(logit_of(probability), key, start, temperature)
    return drawn if kind == "sampled" else (drawn > 0.5).float()


def mask_scale(mean: Tensor, rescale: str) -> Tensor:
    """Return the factor that goes with a mask of this mean: 1 / mean, or 1 for ``rescale`` none.

    An empty mask (mean 0) keeps nothing of the task vector: its factor is 0, not 1/0.

    Args:
        mean: a scalar on any device, which is not waited for.
        rescale: ``mean`` or ``none``.

    Returns:
        float64, a scalar on the same device: a product with float32 is float32.

    Raises:
        ValueError: ``rescale`` is none of RESCALES.
    """
    mean = mean.double()
    if rescale == "none":
        return torch.ones_like(mean)
    if rescale != "mean":
        raise ValueError(f"unknown rescale {rescale!r}: expected one of {', '.join(RESCALES)}")
    return torch.where(mean > 0, 1.0 / mean, 0.0)


def mask_mean(mask: Tensor) -> Tensor:
    """Return the mean of a mask, a scalar, summed in float32."""
    return mask.mean(dtype=torch.float32)


def mask_factor(mask: Tensor, rescale: str, *, out: Tensor | None = None) -> Tensor:
    """Return c = m / mean(m), or m for ``rescale`` none: what a task vector is multiplied by.

    Args:
        mask: m, one value per mask entry, float32.
        rescale: see ``mask_scale``.
        out: where c goes, ``mask`` itself or a tensor like it; a new one where not given.
    """
    return torch.mul(mask, mask_scale(mask_mean(mask), rescale), out=out)


def masked_task_vector(task_vector: Tensor, factor: Tensor) -> Tensor:
    """Return delta * factor, float32 in the shape of ``task_vector``.

    Args:
        task_vector: delta, in the weight's shape.
        factor: see ``mask_factor``; broadcasts to the weight.
    """
    return task_vector.float() * factor
