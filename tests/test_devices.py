"""What is computed on another device than the CPU, nothing left behind: one that is pretended.

Fusions that mergekit computes itself are its own affair.
"""

import json
from contextlib import nullcontext

import pretended
import pytest
import tiny
import torch
from test_repairs import PARAMETERS, recipe_of
from test_streaming import FakeCuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from somf_mergekit.learner import unfilled_model

# Older releases ask every device but the CPU for a module of its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ < (2, 13), reason="a pretended device needs torch 2.13"),
]


@pytest.fixture(autouse=True)
def in_one_way(monkeypatch):
    """In float32, and by the same attention: the CPU has one of its own."""
    monkeypatch.setenv("SOMF_PRECISION", "float32")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tensor_left_behind_is_noticed(monkeypatch):
    with pretended.device(monkeypatch):
        away = torch.ones(3, device=pretended.DEVICE)
        assert (away + 1).sum().item() == 6
        with pytest.raises(RuntimeError, match=r"shape \(3,\) is on the CPU"):
            away + torch.ones(3)


@pytest.mark.parametrize(
    "parameters",
    [
        {"granularity": "row"},
        {"mask_kind": "sampled", "reference": "redrawn"},
        {"mask_kind": "binary", "objective": "ipo", "sft_weight": 0.5},
        {"fusion": "linear", "mask_rescale": "none", "reference": "base"},
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["resident", "streaming"])
def test_a_mask_is_learned_and_used_there(engine, parameters, family_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SOMF_ENGINE", engine)
    content = family_recipe(utility_dataset=str(answers(tmp_path)), **parameters)
    expected = tiny.merged(content, tmp_path / "cpu")
    stands_in_for_cuda(monkeypatch)
    with pretended.device(monkeypatch):
        found = tiny.merged(content, tmp_path / "away", "--device", pretended.DEVICE)
    assert_equal(found, expected)
    assert_equal(tiny.tensors_of(tmp_path / "away/somf"), tiny.tensors_of(tmp_path / "cpu/somf"))


@pytest.mark.parametrize("method", PARAMETERS)
def test_repairs_are_made_there(method, family, tmp_path, monkeypatch):
    content = recipe_of(family, method, **PARAMETERS[method])
    expected = tiny.merged(content, tmp_path / "cpu")
    with pretended.device(monkeypatch):
        found = tiny.merged(content, tmp_path / "away", "--device", pretended.DEVICE)
    assert_equal(found, expected)


def test_models_are_measured_there(family, tmp_path, monkeypatch):
    said = answers(tmp_path)
    sets = ("--safety", said, "--pairs", family / "pairs.jsonl", "--skill", f"math={said}")
    models = (family / "base", family / "math")
    results = {}
    places = {"cpu": nullcontext(), pretended.DEVICE: pretended.device(monkeypatch)}
    for name, place in places.items():
        out = ("--device", name, "--out", tmp_path / name)
        with place:
            reported = tiny.invoke("mergekit-somf", "evaluate", *models, *sets, *out)
        assert reported.exit_code == 0, reported.output
        results[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert results["cpu"]["models"] == results[pretended.DEVICE]["models"]


def answers(folder):
    rows = tiny.preference_rows(6, seed=4)
    found = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows]
    return tiny.write_jsonl(folder / "answers.jsonl", found)


def stands_in_for_cuda(monkeypatch):
    """Let memory be pinned that is not, and weights be moved though they are of another class."""

    def move(moved, device, is_brought):
        moved.to(device)
        if is_brought:
            for weight in moved.parameters():
                weight.untyped_storage().resize_(0)

    runtime = FakeCuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(unfilled_model, "_move", move)
