"""The Triton kernels: by Triton's interpreter what torch computes, and compiled for GPUs."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from test_learner import TRAJECTORIES, make_problem, trajectory

from somf_mergekit import masking, noise, pieces
from somf_mergekit.learner import entrywise, triton_check
from somf_mergekit.learner.draws import Draw
from somf_mergekit.shards import Shard
from somf_mergekit.weights import LinearWeight

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    # For the interpreter, see conftest.
    return importlib.import_module("somf_mergekit.learner.kernels")


DRAWS = {
    "sample": lambda logits, key: Draw(logits, key, 0, 0.5),
    "another temperature": lambda logits, key: Draw(logits, key, 0, 0.2),
    "soft": lambda logits, key: Draw(logits, None, 0, 0.5),
    "untrained": lambda logits, key: Draw(torch.tensor(0.3).expand(len(logits)), key, 0, 0.5),
    "later rows": lambda logits, key: Draw(logits, key, 4099, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", ["mean", "none"])
@pytest.mark.parametrize("name", DRAWS)
def test_kernels_compute_the_formulas(kernels, name, rescale, dtype, monkeypatch):
    # The last part is shorter, and its first entry is not the first of its word.
    monkeypatch.setattr(pieces, "_PIECE_OF_DEVICE", 1501)
    shape = (37, 97)
    generator = torch.Generator().manual_seed(0)
    start, fused, gradient, logits = torch.randn(4, *shape, generator=generator)
    merged, shard = LinearWeight(start.to(dtype), fused.to(dtype)), Shard(shape)
    draw = DRAWS[name](logits.view(-1), noise.noise_key(seed=0, step=3, name="w"))
    weight = torch.full(shape, torch.nan, dtype=dtype)
    kernels.write_masked(weight, merged, draw, rescale, shard)
    mask = draw.part(slice(0, start.numel())).view(shape)
    expected = merged.start.float() + merged.fused.float() * masking.mask_factor(mask, rescale)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(weight, expected.to(dtype), **tolerance)
    kept = gradient.to(dtype)
    found = torch.full((start.numel(),), torch.nan)
    for part, piece in kernels.logit_gradients(kept, merged, draw, rescale, shard):
        found[part] = piece
    factor_gradient = kept.float() * merged.fused.float()
    formula = masking.logit_gradient(factor_gradient, mask, draw.temperature, rescale)
    torch.testing.assert_close(found, formula.view(-1), rtol=1e-4, atol=1e-5)


def test_learning_with_kernels_goes_the_same_way(kernels, monkeypatch):
    changes = TRAJECTORIES["defaults"] | {"max_steps": 2}
    losses, logits = trajectory(make_problem(**changes))
    used = []
    monkeypatch.setattr(entrywise, "kernels_for", lambda device: used.append(device) or kernels)
    other_losses, other = trajectory(make_problem(**changes))
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

TYPES = {"blocks": "i32", "key": "i64", "word": "i32", "count": "i32", "sharpness": "fp32"}
FLOATS = ("sums", "scale", "common", "found", "logits")
MADE_FOR = {"WEIGHTED": True, "DRAWN": True, "STRIDE": 1, "SKIPPED": 0, "WORDS": 256}
for kernel in (kernels._totals_kernel, kernels._write_kernel, kernels._gradient_kernel):
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
        assert "ld.global.v2.b32" in compiled.asm["ptx"]
        print(kernel.fn.__name__, capability)
"""


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
    assert len(done.stdout.splitlines()) == 6


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
    ("found", "told"),
    [
        (no_compiler, "(Failed to find C compiler): torch computes the masks"),
        (lambda module, device: 0.5, "(it computes something else, by 5.0e-01)"),
    ],
)
def test_where_kernels_fail_torch_is_used_and_it_is_told_once(found, told, monkeypatch, capsys):
    monkeypatch.setattr(triton_check, "largest_error", found)
    triton_check._tried.cache_clear()
    assert triton_check.kernels_for(GPU) is None
    assert triton_check.kernels_for(GPU) is None
    shown = capsys.readouterr().err
    assert shown.count("somf: Triton can't be used on cuda") == 1
    assert told in shown
    triton_check._tried.cache_clear()


def test_a_wrong_kernel_shows(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_scale", lambda total, entries: torch.ones(()))
    assert triton_check.largest_error(kernels, torch.device("cpu")) > 0.01
