"""Every way of writing a masked weight computes in float32 and rounds once, at the end."""

import importlib

import pytest
import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata

from somf_mergekit.fusion.shards import Shard
from somf_mergekit.fusion.sums import WeightedSum
from somf_mergekit.fusion.weights import LinearWeight
from somf_mergekit.learner import entrywise
from somf_mergekit.learner.draws import Draw, MergedMask
from somf_mergekit.mask import masking, noise

SHAPE = (64, 64)


def by_sum(weight, merged, draw, rescale):
    """As a merge does: D is the difference of two models here."""
    base, tuned = merged.start, merged.start + merged.fused
    group = TensorGroup(
        (TensorEntry("base", base, True), TensorEntry("tuned", tuned)), TensorMetadata(name="w")
    )
    factor = masking.mask_factor(draw.part(slice(0, weight.numel())).view(SHAPE), rescale)
    weight.copy_(WeightedSum(1.0, (1.0,)).masked(group, factor))


def by_factor(weight, merged, draw, rescale):
    factor = masking.mask_factor(draw.part(slice(0, weight.numel())).view(SHAPE), rescale)
    merged.write(weight, factor)


def by_entry(weight, merged, draw, rescale):
    entrywise.write_masked(weight, merged, draw, rescale, Shard(SHAPE))


def by_kernel(weight, merged, draw, rescale):
    pytest.importorskip("triton")
    kernels = importlib.import_module("somf_mergekit.learner.kernels")
    if not isinstance(draw, Draw):
        pytest.skip("kernels write masks that are learned, not those of a merge")
    kernels.write_masked(weight, merged, draw, rescale, Shard(SHAPE))


@pytest.mark.parametrize("kind", ["soft", "sample", "merged sample"])
@pytest.mark.parametrize("rescale", masking.RESCALES)
@pytest.mark.parametrize("write", [by_sum, by_factor, by_entry, by_kernel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_once(write, rescale, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    # Sums of multiples of 1/8 and of 1/16 below 8 are exact in both types: D is what it says.
    start, fused = (torch.randint(-16, 17, SHAPE, generator=generator).to(dtype) for _ in range(2))
    merged = LinearWeight(start / 8, fused / 16)
    logits = torch.randn(SHAPE, generator=generator).view(-1)
    draw = Draw(logits, noise.noise_key(seed=0, step=3, name="w"), 0, 0.5)
    if kind == "soft":
        draw = Draw(logits, None, 0, 0.5)
    elif kind == "merged sample":
        draw = MergedMask(draw, "sampled")
    weight = torch.full(SHAPE, torch.nan, dtype=dtype)
    write(weight, merged, draw, rescale)
    factor = masking.mask_factor(draw.part(slice(0, weight.numel())).view(SHAPE), rescale)
    exact = merged.start.float() + merged.fused.float() * factor
    if write is by_kernel:
        if dtype == torch.bfloat16:
            # Triton's interpreter cuts digits off, where a GPU rounds.
            exact = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
        # Its logarithm and its sums may differ in float32's last digit: a few land elsewhere.
        assert (weight != exact.to(dtype)).float().mean() < 2e-3
    else:
        assert torch.equal(weight, exact.to(dtype))
