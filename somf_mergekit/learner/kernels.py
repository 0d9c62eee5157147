"""The passes of ``entrywise`` as Triton kernels: a GPU reads and writes each tensor once a pass.

Noise and mask are computed in registers, by the counter of ``noise.uniform_noise``. The formulas
are those of ``masking``; ``entrywise`` has them in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fusion.shards import Shard
from ..fusion.weights import LinearWeight
from .draws import Draw
from .optimizer import EPS, TINY

# Words of noise a program, of four entries each.
_WORDS = 256


def write_masked(
    weight: Tensor, merged: LinearWeight, draw: Draw, rescale: str, shard: Shard
) -> None:
    """Do what ``entrywise.write_masked`` does."""
    flat, fused, start = weight.view(-1), merged.fused.view(-1), merged.start.reshape(-1)
    totals = _totals(draw, rescale, shard)
    values = flat, start, fused, totals, float(shard.entries)
    _write_kernel[_grid(draw)](*values, *_mask(draw), **_constants(draw, rescale))


def update_logits(
    gradient: Tensor,
    fused: Tensor | None,
    draw: Draw,
    rescale: str,
    shard: Shard,
    rate: float,
) -> Tensor:
    """Take the step of ``optimizer.signsgd_step`` on the logits of ``draw``.

    Weight and gradient stay as they are.

    Args:
        gradient: dL/dW in the weight's shape, complete; or dL/dc of each entry.
        fused: D, in the weight's shape; None where the gradient is that of the mask's factor.
        draw, rescale, shard: see ``optimizer.logit_gradient``.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the logits' gradient, see there.
    """
    products = gradient.reshape(-1)
    other = products if fused is None else fused.view(-1)
    of_weight = {"FUSED": fused is not None}
    totals = _totals(draw, rescale, shard, (products, other), **of_weight)
    squares = torch.empty(_grid(draw), device=products.device)
    values = squares, products, other, totals, float(shard.entries), rate
    constants = _constants(draw, rescale) | of_weight
    _update_kernel[_grid(draw)](*values, *_mask(draw), **constants, EPS=EPS, TINY=TINY)
    return squares.sum()


def whole_mask(draw: Draw) -> Tensor:
    """Return all of a mask, float32, (count,)."""
    found = torch.empty(len(draw.logits), device=draw.logits.device)
    _mask_kernel[_grid(draw)](found, *_mask(draw), **_constants(draw))
    return found


def _totals(
    draw: Draw,
    rescale: str,
    shard: Shard,
    weighted: tuple[Tensor, Tensor] | None = None,
    FUSED: bool = True,
) -> Tensor:
    """Return sum(m), float32 (1,), with sum(G m) and sum(|G| m (1 - m)) (3,) where G is given.

    They are of the whole mask. G is the product of ``weighted``, or the first where not FUSED.
    """
    grid = _grid(draw)
    # A sum for each program, added up after: atomic additions come in another order every time.
    sums = torch.empty((3 if weighted else 1, *grid), device=draw.logits.device)
    # What the kernels do not read where nothing is rescaled.
    if rescale == "none" and not weighted:
        return sums.view(-1)[:1]
    values = (sums, *(weighted or (sums, sums)), *grid, *_mask(draw))
    constants = _constants(draw) | {"WEIGHTED": bool(weighted), "FUSED": FUSED}
    _totals_kernel[grid](*values, **constants)
    return shard.add_up(sums.sum(dim=1))


def _grid(draw: Draw) -> tuple[int]:
    # The first entry may be the last one of its word.
    return (triton.cdiv(len(draw.logits) + 3, 4 * _WORDS),)


def _mask(draw: Draw) -> tuple[Tensor, int, int, int, float]:
    """Return what tells a kernel the mask."""
    return draw.logits, draw.key or 0, draw.first // 4, len(draw.logits), 1 / draw.temperature


def _constants(draw: Draw, rescale: str | None = None) -> dict[str, int | bool]:
    """Return what a kernel is compiled for."""
    found = {
        "DRAWN": draw.key is not None,
        "STRIDE": draw.logits.stride(0) if len(draw.logits) > 1 else 1,
        "SKIPPED": draw.first % 4,
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
def _factor_gradient(products, fused, at, exists, FUSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return dL/dc of a program's entries, 0 where there is none."""
    found = tl.load(products + at, mask=exists, other=0.0).to(tl.float32)
    if FUSED:
        found *= tl.load(fused + at, mask=exists, other=0.0).to(tl.float32)
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
    sums, products, fused, blocks, logits, key, word, count, sharpness,
    WEIGHTED: tl.constexpr, FUSED: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr,
    SKIPPED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    block = tl.program_id(0)
    tl.store(sums + block, tl.sum(mask))
    if WEIGHTED:
        of_factor = _factor_gradient(products, fused, at, exists, FUSED)
        tl.store(sums + blocks + block, tl.sum(of_factor * mask))
        sizes = tl.abs(of_factor) * mask * (1 - mask)
        tl.store(sums + 2 * blocks + block, tl.sum(sizes))


@triton.jit(do_not_specialize=_VARYING)
def _write_kernel(  # type: ignore[no-untyped-def]
    weight, start, fused, totals, entries, logits, key, word, count, sharpness,
    RESCALED: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    if RESCALED:
        mask *= _scale(totals, entries)
    change = mask * tl.load(fused + at, mask=exists, other=0.0).to(tl.float32)
    merged = change + tl.load(start + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(weight + at, merged.to(weight.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def _update_kernel(  # type: ignore[no-untyped-def]
    squares, products, fused, totals, entries, rate, logits, key, word, count, sharpness,
    RESCALED: tl.constexpr, FUSED: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr,
    SKIPPED: tl.constexpr, WORDS: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    slope = mask * (1 - mask) * sharpness
    own = _factor_gradient(products, fused, at, exists, FUSED) * slope
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
