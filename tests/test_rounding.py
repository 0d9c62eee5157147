"""Every way of writing a masked weight computes in float32 and rounds once, at the end."""

import importlib

import pytest
import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata

from somf_mergekit.fusion.masked_fusion import fused_masked
from somf_mergekit.fusion.merges import LinearMerge
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.mask import masking, noise

SHAPE = (64, 64)


def by_sum(weight, merge, sampler, rescale):
    """As a merge does: D is the difference of two models here."""
    base, tuned = merge.start, merge.start + merge.deltas[0]
    group = TensorGroup(
        (TensorEntry("base", base, True), TensorEntry("tuned", tuned)), TensorMetadata(name="w")
    )
    factor = masking.mask_factor(sampler.whole().view(SHAPE), rescale)
    values = {"fusion": "task_arithmetic", "weight": {"tuned": 1.0}, "seed": 0}
    weight.copy_(fused_masked(group, {"tuned": (factor,)}, values))


def by_factor(weight, merge, sampler, rescale):
    merge.write(weight, [[masking.mask_factor(sampler.whole().view(SHAPE), rescale)]])


def by_entry(weight, merge, sampler, rescale):
    merge.write_sampled(weight, [sampler], rescale, Shard(SHAPE))


def by_kernel(weight, merge, sampler, rescale):
    pytest.importorskip("triton")
    kernels = importlib.import_module("somf_mergekit.learner.kernels")
    if sampler.kind:
        pytest.skip("kernels write masks that are learned, not those of a merge")
    kernels.write_sampled(merge, weight, sampler, rescale, Shard(SHAPE))


@pytest.mark.parametrize("kind", ["soft", "sample", "merged sample"])
@pytest.mark.parametrize("rescale", masking.RESCALES)
@pytest.mark.parametrize("write", [by_sum, by_factor, by_entry, by_kernel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_once(write, rescale, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    # Sums of multiples of 1/8 and of 1/16 below 8 are exact in both types: D is what it says.
    start, delta = (torch.randint(-16, 17, SHAPE, generator=generator).to(dtype) for _ in range(2))
    merge = LinearMerge(start / 8, (delta / 16,))
    logits = torch.randn(SHAPE, generator=generator).view(-1)
    key = None if kind == "soft" else noise.noise_key(seed=0, step=3, name="w")
    of_merge = "sampled" if kind == "merged sample" else None
    sampler = masking.MaskSampler(logits, 0.5, key, kind=of_merge)
    weight = torch.full(SHAPE, torch.nan, dtype=dtype)
    write(weight, merge, sampler, rescale)
    factor = masking.mask_factor(sampler.whole().view(SHAPE), rescale)
    exact = merge.start.float() + merge.deltas[0].float() * factor
    if write is by_kernel:
        if dtype == torch.bfloat16:
            # Triton's interpreter cuts digits off, where a GPU rounds.
            exact = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
        # Its logarithm and its sums may differ in float32's last digit: a few land elsewhere.
        assert (weight != exact.to(dtype)).float().mean() < 2e-3
    else:
        assert torch.equal(weight, exact.to(dtype))
