"""The Triton kernels: by Triton's interpreter what torch computes, and compiled for GPUs."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from setups import TRAJECTORIES, make_setup, trajectory
from test_masking import logit_gradient, signsgd

from somf_mergekit.fusion.merges import LinearMerge
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.learner import optimizer, tensors, triton_check
from somf_mergekit.mask import masking, noise
from somf_mergekit.mask.masking import MaskSampler

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    # For the interpreter, see conftest.
    return importlib.import_module("somf_mergekit.learner.kernels")


SAMPLERS = {
    "sample": lambda logits, key: MaskSampler(logits, 0.5, key),
    "another temperature": lambda logits, key: MaskSampler(logits, 0.2, key),
    "soft": lambda logits, key: MaskSampler(logits, 0.5),
    "untrained": lambda logits, key: MaskSampler(torch.tensor(0.3).expand(len(logits)), 0.5, key),
    "later rows": lambda logits, key: MaskSampler(logits, 0.5, key, 4099),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", ["mean", "none"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_kernels_compute_the_formulas(kernels, name, rescale, dtype, monkeypatch):
    # A step is then as long as its gradient says, and not about as long as the rate.
    for module in (kernels, optimizer):
        monkeypatch.setattr(module, "EPS", 1.0)
    # The last program has few entries.
    shape = (37, 97)
    generator = torch.Generator().manual_seed(0)
    start, delta, gradient, logits = torch.randn(4, *shape, generator=generator)
    merge, shard = LinearMerge(start.to(dtype), (delta.to(dtype),)), Shard(shape)
    logits_before = logits.clone()
    sampler = SAMPLERS[name](logits.view(-1), noise.noise_key(seed=0, step=3, name="w"))
    mask = sampler.whole().view(shape)
    torch.testing.assert_close(kernels.whole_mask(sampler).view(shape), mask)
    weight = torch.full(shape, torch.nan, dtype=dtype)
    kernels.write_sampled(merge, weight, sampler, rescale, shard)
    expected = merge.start.float() + merge.deltas[0].float() * masking.mask_factor(mask, rescale)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(weight, expected.to(dtype), **tolerance)
    if name == "untrained":
        return
    stored = gradient.to(dtype)
    # Rows of tokens that no pair has.
    stored[::3] = 0
    own_product = stored.float() * merge.deltas[0].float()
    formula, own = logit_gradient(own_product, mask, sampler.temperature, rescale)
    expected = signsgd(logits, formula, own, 0.25, 1.0).float()
    given = stored.clone()
    of_factor = optimizer.FactorGradient(stored, merge.deltas[0], sampler, rescale, shard, weight)
    found = kernels.update_logits(of_factor, 0.25)
    assert float(found) == pytest.approx(float(formula.square().sum()), rel=1e-4)
    assert torch.equal(stored, given)
    assert torch.equal(sampler.logits.view(shape)[::3], logits_before[::3])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["defaults", "row"])
def test_learning_with_kernels_goes_the_same_way(kernels, name, monkeypatch):
    changes = TRAJECTORIES[name] | {"max_steps": 2}
    losses, logits = trajectory(make_setup(**changes))
    used = []
    monkeypatch.setattr(tensors, "kernels_for", lambda device: used.append(device) or kernels)
    other_losses, other = trajectory(make_setup(**changes))
    assert used
    assert other_losses == pytest.approx(losses, abs=1e-5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(logits, other, strict=True)])
    assert (difference.abs() < 1e-3).float().mean() > 0.99


# An address, entries that 16 divides, and what a kernel is made for.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from somf_mergekit.learner import kernels

TYPES = {"blocks": "i32", "key": "i64", "word": "i32", "count": "i32"}
TYPES |= dict.fromkeys(("sharpness", "entries", "rate"), "fp32")
FLOATS = ("sums", "totals", "squares", "found", "logits")
MADE_FOR = dict.fromkeys(("WEIGHTED", "HAS_DELTA", "RESCALED", "DRAWN"), True)
MADE_FOR |= {"STRIDE": 1, "SKIPPED": 0, "WORDS": 256, "EPS": 1e-5, "TINY": 1e-38}
names = ("_mask_kernel", "_totals_kernel", "_write_kernel", "_update_kernel")
for kernel in (getattr(kernels, name) for name in names):
    signature, made_for, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in MADE_FOR:
            signature[name], made_for[(place,)] = "constexpr", MADE_FOR[name]
            continue
        default = "*fp32" if name in FLOATS else "*bf16"
        signature[name] = TYPES.get(name, default)
        if name == "count" or name not in TYPES:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=made_for, attrs=aligned)
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(compiled.asm["cubin"]) > 1000
        # Four logits, and four bfloat16 values, at a time.
        assert "ld.global.v4.b32" in compiled.asm["ptx"], compiled.asm["ptx"]
        assert kernel.arg_names[0] == "found" or "ld.global.v2.b32" in compiled.asm["ptx"]
        print(kernel.fn.__name__, capability)
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_and_read_four_entries_at_once(tmp_path):
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("this Triton takes what it compiles ahead of use in another form")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


GPU = torch.device("cuda")


def test_kernels_are_not_used_on_the_cpu():
    assert triton_check.kernels_for(torch.device("cpu")) is None


def test_kernels_are_tried_before_they_are_used(kernels, monkeypatch):
    # On the interpreter, in the place of a GPU.
    error = triton_check.largest_error(kernels, torch.device("cpu"))
    assert error < 1e-6
    monkeypatch.setattr(triton_check, "largest_error", lambda module, device: error)
    triton_check._tried.cache_clear()
    assert triton_check.kernels_for(GPU) is kernels
    triton_check._tried.cache_clear()


def no_compiler(module, device):
    raise RuntimeError("Failed to find C compiler\nand more")


@pytest.mark.parametrize(
    ("found", "reported"),
    [
        (no_compiler, "(Failed to find C compiler): torch computes the masks"),
        (lambda module, device: 0.5, "(it computes something else, by 5.0e-01)"),
    ],
)
def test_where_kernels_fail_torch_is_used_and_it_is_reported_once(
    found, reported, monkeypatch, capsys
):
    monkeypatch.setattr(triton_check, "largest_error", found)
    triton_check._tried.cache_clear()
    assert triton_check.kernels_for(GPU) is None
    assert triton_check.kernels_for(GPU) is None
    shown = capsys.readouterr().err
    assert shown.count("somf: Triton can't be used on cuda") == 1
    assert reported in shown
    triton_check._tried.cache_clear()


def test_a_wrong_kernel_shows(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_totals", lambda *_, **__: torch.ones(3))
    assert triton_check.largest_error(kernels, torch.device("cpu")) > 0.01
