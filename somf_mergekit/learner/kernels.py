"""Masks, weights and steps as Triton kernels: a GPU reads and writes each tensor once a pass.

Noise and mask are computed in registers, by the counter of ``noise.uniform_noise``. The formulas in
torch are those of ``masking.MaskSampler``, ``merges.LinearMerge`` and ``optimizer``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fusion.merges import LinearMerge
from ..fusion.shards import Shard
from ..mask.masking import MaskSampler
from .optimizer import EPS, TINY, FactorGradient

# Words of noise a program, of four entries each.
_WORDS = 256


def write_sampled(
    merge: LinearMerge, weight: Tensor, sampler: MaskSampler, rescale: str, shard: Shard
) -> None:
    """Do what ``LinearMerge.write_sampled`` does with one mask."""
    (own,) = merge.deltas
    flat, delta, start = weight.view(-1), own.view(-1), merge.start.reshape(-1)
    totals = _totals(sampler, rescale, shard)
    values = flat, start, delta, totals, float(shard.entries)
    _write_kernel[_grid(sampler)](*values, *_mask(sampler), **_constants(sampler, rescale))


def update_logits(of_factor: FactorGradient, rate: float) -> Tensor:
    """Take the step of ``optimizer.signsgd_step`` on the logits of the sampler.

    What ``optimizer.logit_gradient`` writes over stays as it is.

    Args:
        of_factor: dL/dc.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the logits' gradient, see there.
    """
    sampler, rescale, shard = of_factor.sampler, of_factor.rescale, of_factor.shard
    products, delta = of_factor.gradient.reshape(-1), of_factor.delta
    other = products if delta is None else delta.view(-1)
    has_delta = {"HAS_DELTA": delta is not None}
    totals = _totals(sampler, rescale, shard, (products, other), **has_delta)
    squares = torch.empty(_grid(sampler), device=products.device)
    values = squares, products, other, totals, float(shard.entries), rate
    constants = _constants(sampler, rescale) | has_delta
    _update_kernel[_grid(sampler)](*values, *_mask(sampler), **constants, EPS=EPS, TINY=TINY)
    return squares.sum()


def whole_mask(sampler: MaskSampler) -> Tensor:
    """Return all of a mask, float32, (count,)."""
    found = torch.empty(len(sampler.logits), device=sampler.logits.device)
    _mask_kernel[_grid(sampler)](found, *_mask(sampler), **_constants(sampler))
    return found


def _totals(
    sampler: MaskSampler,
    rescale: str,
    shard: Shard,
    weighted: tuple[Tensor, Tensor] | None = None,
    HAS_DELTA: bool = True,
) -> Tensor:
    """Return sum(m), float32 (1,), with sum(G m) and sum(|G| m (1 - m)) (3,) where G is given.

    They are of the whole mask. G is the product of ``weighted``, or the first where not HAS_DELTA.
    """
    grid = _grid(sampler)
    # A sum for each program, added up after: atomic additions come in another order every time.
    sums = torch.empty((3 if weighted else 1, *grid), device=sampler.logits.device)
    # What the kernels do not read where nothing is rescaled.
    if rescale == "none" and not weighted:
        return sums.view(-1)[:1]
    values = (sums, *(weighted or (sums, sums)), *grid, *_mask(sampler))
    constants = _constants(sampler) | {"WEIGHTED": bool(weighted), "HAS_DELTA": HAS_DELTA}
    _totals_kernel[grid](*values, **constants)
    return shard.add_up(sums.sum(dim=1))


def _grid(sampler: MaskSampler) -> tuple[int]:
    # The first entry may be the last one of its word.
    return (triton.cdiv(len(sampler.logits) + 3, 4 * _WORDS),)


def _mask(sampler: MaskSampler) -> tuple[Tensor, int, int, int, float]:
    """Return the kernels' arguments that say what the mask is."""
    return (
        sampler.logits,
        sampler.key or 0,
        sampler.first // 4,
        len(sampler.logits),
        1 / sampler.temperature,
    )


def _constants(sampler: MaskSampler, rescale: str | None = None) -> dict[str, int | bool]:
    """Return what a kernel is compiled for."""
    found = {
        "DRAWN": sampler.key is not None,
        "STRIDE": sampler.logits.stride(0) if len(sampler.logits) > 1 else 1,
        "SKIPPED": sampler.first % 4,
        "WORDS": _WORDS,
    }
    return found if rescale is None else {**found, "RESCALED": rescale == "mean"}


# A kernel is compiled anew for a count that 16 divides: then entries are read four at once.
_VARYING = ["key", "word", "sharpness", "entries", "rate"]


@triton.jit
def _places(word, count, SKIPPED: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the words and lanes of a program's entries, their places, and whether they exist."""
    own = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    lanes = tl.arange(0, 4)[None, :]
    at = 4 * own + lanes - SKIPPED
    exists = at < count
    if SKIPPED:
        exists = exists & (at >= 0)
    return word.to(tl.int64) + own, lanes, at, exists


@triton.jit
def _uniform(words, lanes, key):  # type: ignore[no-untyped-def]
    """Return u of SplitMix64's 16-bit lanes, see ``noise``."""
    bits = (words + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    lane = (bits >> (16 * lanes).to(tl.uint64)) & 0xFFFF
    # The lanes are signed numbers there.
    return ((lane ^ 0x8000).to(tl.float32) + 0.5) * (1.0 / 65536)


@triton.jit
def _mask_of(  # type: ignore[no-untyped-def]
    logits, key, words, lanes, at, exists, sharpness, DRAWN: tl.constexpr, STRIDE: tl.constexpr
):
    """Return m of a program's entries, 0 where there is none."""
    x = tl.load(logits + at * STRIDE, mask=exists, other=0.0).to(tl.float32)
    if DRAWN:
        u = _uniform(words, lanes, key)
        x = (x - tl.log((1 - u) / u)) * sharpness
    return tl.where(exists, tl.sigmoid(x), 0.0)


@triton.jit
def _scale(totals, entries):  # type: ignore[no-untyped-def]
    """Return what ``masking.mask_scale`` gives for a mean."""
    total = tl.load(totals)
    return tl.where(total > 0, entries / total, 0.0)


@triton.jit
def _factor_gradient(products, delta, at, exists, HAS_DELTA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return dL/dc of a program's entries, 0 where there is none."""
    found = tl.load(products + at, mask=exists, other=0.0).to(tl.float32)
    if HAS_DELTA:
        found *= tl.load(delta + at, mask=exists, other=0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=_VARYING)
def _mask_kernel(  # type: ignore[no-untyped-def]
    found, logits, key, word, count, sharpness,
    DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    tl.store(found + at, mask, mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def _totals_kernel(  # type: ignore[no-untyped-def]
    sums, products, delta, blocks, logits, key, word, count, sharpness,
    WEIGHTED: tl.constexpr, HAS_DELTA: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr,
    SKIPPED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    block = tl.program_id(0)
    tl.store(sums + block, tl.sum(mask))
    if WEIGHTED:
        of_factor = _factor_gradient(products, delta, at, exists, HAS_DELTA)
        tl.store(sums + blocks + block, tl.sum(of_factor * mask))
        sizes = tl.abs(of_factor) * mask * (1 - mask)
        tl.store(sums + 2 * blocks + block, tl.sum(sizes))


@triton.jit(do_not_specialize=_VARYING)
def _write_kernel(  # type: ignore[no-untyped-def]
    weight, start, delta, totals, entries, logits, key, word, count, sharpness,
    RESCALED: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    if RESCALED:
        mask *= _scale(totals, entries)
    change = mask * tl.load(delta + at, mask=exists, other=0.0).to(tl.float32)
    merged = change + tl.load(start + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(weight + at, merged.to(weight.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def _update_kernel(  # type: ignore[no-untyped-def]
    squares, products, delta, totals, entries, rate, logits, key, word, count, sharpness,
    RESCALED: tl.constexpr, HAS_DELTA: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr,
    SKIPPED: tl.constexpr, WORDS: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    slope = mask * (1 - mask) * sharpness
    own = _factor_gradient(products, delta, at, exists, HAS_DELTA) * slope
    size = tl.load(totals + 2) * sharpness / entries
    gradient = own
    if RESCALED:
        scale = _scale(totals, entries)
        own *= scale
        size *= scale
        gradient = own - tl.load(totals + 1) * scale * scale / entries * slope
    tl.store(squares + tl.program_id(0), tl.sum(gradient * gradient))
    least = tl.minimum(tl.abs(gradient), tl.abs(own))
    step = rate * least / (least + tl.maximum(EPS * size, TINY))
    step = tl.where(gradient < 0, -step, step)
    x = tl.load(logits + at * STRIDE, mask=exists, other=0.0)
    tl.store(logits + at * STRIDE, x - step, mask=exists)
