"""The mathematics of masks: pure functions on tensors.

A mask has the weight's shape or a coarser one that broadcasts to it, or is a product of such. The
formulas are those of
arXiv 2405.09055 (subspace-oriented model fusion) and arXiv 2312.06173 (concrete masks).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.chunks import pieces
from .format import stored_probability
from .granularity import Layout
from .noise import noise_key, uniform_noise

MASK_KINDS = ("soft", "binary", "sampled", "bernoulli")
RESCALES = ("mean", "none")
# The draw of a mask at merge time; optimiser steps count from 0.
MERGE_STEP = -1
# Makes the logit of a probability finite (within +-13.8).
PROBABILITY_EDGE = 1e-6


@dataclass(frozen=True)
class MaskSampler:
    """A mask, any part of which can be computed alone: nothing of it is stored.

    Attributes:
        logits: x of consecutive entries of the flattened mask, (count,); an expanded tensor where
            one logit stands for all.
        temperature: T of a concrete sample.
        key: of the noise, see ``noise.noise_key``; None for the soft mask, sigmoid(x).
        first: the number of the first of these entries in the flattened mask.
        kind: one of MASK_KINDS, for what a merge makes of the probabilities once they have been
            stored; None for the soft mask or the concrete sample of the logits themselves.
    """

    logits: Tensor
    temperature: float
    key: int | None = None
    first: int = 0
    kind: str | None = None

    def part(self, part: slice) -> Tensor:
        """Return the mask of a part of the entries, float32."""
        logits, start = self.logits[part], self.first + part.start
        if self.kind is not None:
            assert self.key is not None
            probability = stored_probability(torch.sigmoid(logits))
            return _merged_part(probability, self.kind, self.key, start, self.temperature)
        if self.key is None:
            return torch.sigmoid(logits)
        return _concrete_part(logits, self.key, start, self.temperature)

    def whole(self) -> Tensor:
        """Return the mask of all entries, float32 (count,)."""
        parts = pieces(len(self.logits), self.logits.device)
        return torch.cat([self.part(part) for part in parts])


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
        flat[part] = _merged_part(entries[part].float(), kind, key, part.start, temperature)
    return mask


def _merged_part(
    probability: Tensor, kind: str, key: int, start: int, temperature: float
) -> Tensor:
    """Return what ``mask_from_probabilities`` makes of consecutive entries, the first at start."""
    if kind == "soft":
        return probability
    if kind == "binary":
        return (probability > 0.5).float()
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {kind!r}: expected one of {', '.join(MASK_KINDS)}")
    logits = torch.logit(probability, eps=PROBABILITY_EDGE)
    drawn = _concrete_part(logits, key, start, temperature)
    return drawn if kind == "sampled" else (drawn > 0.5).float()


def _concrete_part(logits: Tensor, key: int, start: int, temperature: float) -> Tensor:
    """Return sigmoid((x + log u - log(1 - u)) / T) of consecutive entries, the first at start."""
    uniform = uniform_noise(key, len(logits), start=start, device=logits.device)
    # log((1 - u) / u) costs one logarithm, and 1 - u is exact.
    noise = (1 - uniform).div_(uniform).log_()
    return torch.sub(logits, noise, out=noise).div_(temperature).sigmoid_()


def mask_scale(mean: Tensor, rescale: str) -> Tensor:
    """Return the factor that goes with a mask of this mean: 1 / mean, or 1 for ``rescale`` none.

    An empty mask (mean 0) leaves nothing of the task vector: its factor is 0, not 1/0.

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


def mask_factor(
    mask: Tensor, rescale: str, layout: Layout | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return c = m / mean(m), or m for ``rescale`` none: what a task vector is multiplied by.

    Of a product of masks, each factor is divided by its own mean: (r / mean r) (c / mean c).

    Args:
        mask: m, one value per mask entry, float32.
        rescale: see ``mask_scale``.
        layout: of the entries; needed where the mask is a product.
        out: where c goes, ``mask`` itself or a tensor like it; a new one where not given.
    """
    out = torch.empty_like(mask) if out is None else out
    flat, entries = out.view(-1), mask.reshape(-1)
    for part, _ in (layout or Layout(tuple(mask.shape))).parts():
        own = entries[part]
        torch.mul(own, mask_scale(own.mean(dtype=torch.float32), rescale), out=flat[part])
    return out
