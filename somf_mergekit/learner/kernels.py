"""The passes of ``entrywise`` as Triton kernels: a GPU reads and writes each tensor once a pass.

Noise and mask are computed in registers, by the counter of ``noise.uniform_noise``. The formulas
are those of ``masking``; ``entrywise`` has them in torch.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pieces import pieces
from ..shards import Shard
from ..weights import LinearWeight
from .draws import Draw

# Words of noise a program, of four entries each.
_WORDS = 256
_A_GPU = "cuda"


def write_masked(
    weight: Tensor, merged: LinearWeight, draw: Draw, rescale: str, shard: Shard
) -> None:
    """Do what ``entrywise.write_masked`` does."""
    flat, fused, start = weight.view(-1), merged.fused.view(-1), merged.start.reshape(-1)
    scale = torch.ones((), device=flat.device)
    if rescale == "mean":
        _, total = _totals(draw, None, None, len(flat))
        scale = _scale(shard.add_up(total), shard.entries)
    for part in pieces(len(flat), _A_GPU):
        values = flat[part], start[part], fused[part], scale
        _write_kernel[_grid(part)](*values, *_mask(draw, part), **_constants(draw, part))


def logit_gradients(
    gradient: Tensor,
    merged: LinearWeight,
    draw: Draw,
    rescale: str,
    shard: Shard,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what ``entrywise.logit_gradients`` yields, and leave weight and gradient as they are.

    Args:
        gradient: dL/dW in the weight's shape, complete.
        merged, draw, rescale, shard: see there.
    """
    products, fused = gradient.reshape(-1), merged.fused.view(-1)
    count = len(products)
    scale, common = (torch.full((), float(n), device=fused.device) for n in (1, 0))
    if rescale == "mean":
        weighted, total = shard.add_up(torch.stack(_totals(draw, products, fused, count)))
        scale = _scale(total, shard.entries)
        common = weighted * scale * scale / shard.entries
    for part in pieces(count, _A_GPU):
        found = torch.empty(part.stop - part.start, device=fused.device)
        values = found, products[part], fused[part], scale, common
        _gradient_kernel[_grid(part)](*values, *_mask(draw, part), **_constants(draw, part))
        yield part, found


def _totals(
    draw: Draw, products: Tensor | None, fused: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Return sum(G D m), 0 where G and D are not given, and sum(m)."""
    whole = slice(0, count)
    grid = _grid(whole)
    # A sum for each program, added up after: atomic additions come in another order every time.
    sums = torch.zeros((2, *grid), device=draw.logits.device)
    is_weighted = products is not None and fused is not None
    values = (sums, products, fused) if is_weighted else (sums, sums, sums)
    constants = _constants(draw, whole)
    _totals_kernel[grid](*values, *grid, *_mask(draw, whole), WEIGHTED=is_weighted, **constants)
    weighted, total = sums.sum(dim=1)
    return weighted, total


def _scale(total: Tensor, entries: int) -> Tensor:
    """Return what ``masking.mask_scale`` gives for a mean, without a word between the devices."""
    return torch.where(total > 0, entries / total, torch.zeros_like(total))


def _grid(part: slice) -> tuple[int]:
    # The first entry may be the last one of its word.
    return (triton.cdiv(part.stop - part.start + 3, 4 * _WORDS),)


def _mask(draw: Draw, part: slice) -> tuple[Tensor, int, int, int, float]:
    """Return what tells a kernel the mask."""
    word = (draw.first + part.start) // 4
    return draw.logits[part], draw.key or 0, word, part.stop - part.start, 1 / draw.temperature


def _constants(draw: Draw, part: slice) -> dict[str, int | bool]:
    """Return what a kernel is compiled for."""
    return {
        "DRAWN": draw.key is not None,
        "STRIDE": draw.logits.stride(0) if len(draw.logits) > 1 else 1,
        "SKIPPED": (draw.first + part.start) % 4,
        "WORDS": _WORDS,
    }


# A kernel is compiled anew for a count that 16 divides: then entries are read four at once.
_VARYING = ["key", "word", "sharpness"]


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


@triton.jit(do_not_specialize=_VARYING)
def _totals_kernel(  # type: ignore[no-untyped-def]
    sums, products, fused, blocks, logits, key, word, count, sharpness,
    WEIGHTED: tl.constexpr, DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    block = tl.program_id(0)
    if WEIGHTED:
        product = tl.load(products + at, mask=exists, other=0.0).to(tl.float32)
        product *= tl.load(fused + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(sums + block, tl.sum(product * mask))
    tl.store(sums + blocks + block, tl.sum(mask))


@triton.jit(do_not_specialize=_VARYING)
def _write_kernel(  # type: ignore[no-untyped-def]
    weight, start, fused, scale, logits, key, word, count, sharpness,
    DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    change = tl.load(fused + at, mask=exists, other=0.0).to(tl.float32) * mask * tl.load(scale)
    merged = change + tl.load(start + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(weight + at, merged.to(weight.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    found, products, fused, scale, common, logits, key, word, count, sharpness,
    DRAWN: tl.constexpr, STRIDE: tl.constexpr, SKIPPED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    words, lanes, at, exists = _places(word, count, SKIPPED, WORDS)
    mask = _mask_of(logits, key, words, lanes, at, exists, sharpness, DRAWN, STRIDE)
    product = tl.load(products + at, mask=exists, other=0.0).to(tl.float32)
    product *= tl.load(fused + at, mask=exists, other=0.0).to(tl.float32)
    gradient = (product * tl.load(scale) - tl.load(common)) * mask * (1 - mask) * sharpness
    tl.store(found + at, gradient, mask=exists)
