"""A base in 4 or 8 bits while a mask of adapters is learned: the merge itself stays exact."""

import json
import shutil
import sys

import pytest
import tiny
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from setups import FIRST, adapter, adapter_plan, adapter_recipe, adapters_learned
from transformers import AutoModelForCausalLM

from somf_mergekit.common import machine
from somf_mergekit.common.errors import RecipeError
from somf_mergekit.evaluate.likelihood import preference_margins
from somf_mergekit.prepass.forecast import forecast

PRECISIONS = pytest.mark.parametrize("precision", ["4bit", "8bit"])


def rounded(weight, precision):
    """What a weight is in few bits."""
    if precision == "4bit":
        found = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return functional.dequantize_4bit(*found)
    whole, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return whole * scales[:, None] / 127


@PRECISIONS
@pytest.mark.parametrize(
    "changes",
    [{"granularity": "row"}, {"granularity": "row_column", "mask_sharing": "per_model"}],
    ids=["row", "row and column, each model"],
)
def test_the_trajectory_is_that_of_a_rounded_base(adapted, tmp_path, precision, changes):
    """Of linear layers the weights are rounded, not biases; embeddings and head aren't."""
    root = tmp_path / "rounded"
    shutil.copytree(adapted, root)
    weights = tiny.tensors_of(root / "base")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = rounded(weight, precision).float().contiguous()
            assert 1e-4 < (weights[name] - weight).norm() / weight.norm() < 0.2
    save_file(weights, root / "base" / "model.safetensors", metadata={"format": "pt"})
    for file in root.glob("*/adapter_config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": str(root / "base")}))
    losses, logits = adapters_learned(root, tmp_path, **changes)
    few_bits = {"base_precision": precision}
    own_losses, own_logits = adapters_learned(adapted, tmp_path, machine=few_bits, **changes)
    torch.testing.assert_close(own_losses, losses, rtol=1e-4, atol=1e-4)
    moved = torch.cat([own.flatten() for own in logits])
    found = torch.cat([own.flatten() for own in own_logits])
    assert moved.abs().max() > 0.1
    assert ((found - moved).abs() > 1e-3).float().mean() < 0.01


def command(what, root, content, folder, *options):
    file = tiny.write_recipe(folder / "recipe.yml", content)
    cache = ("--lora-merge-cache", root / "cache")
    return tiny.invoke("mergekit-somf", what, file, *options, *cache)


def test_the_merge_and_what_is_reported_of_it_are_exact(adapted, tmp_path):
    content = adapter_recipe(adapted, granularity="row", held_out_share=0.5)
    out = tmp_path / "out"
    few_bits = ("--base-precision", "4bit")
    result = command("merge", adapted, content, tmp_path, out, *few_bits)
    assert result.exit_code == 0, result.output
    assert "somf: factored: needs about" in result.output
    assert "the base's linear layers are in 4 bits" in result.output
    assert "learned in 4 steps on a base in 4 bits; " in result.output
    assert json.loads((out / "somf" / "somf.json").read_text())["learned_with"] == {
        "engine": "factored",
        "precision": "float32",
        "device": "cpu",
        "processes": 1,
        "micro_batch": 4,
        "base_precision": "4bit",
    }
    assert "base_precision 4bit" in (out / "somf" / "report.md").read_text()
    # The same mask and none, in merges of their own, and the held-out pairs under these.
    folders = {"merge": tmp_path / "again", "plain_fusion": tmp_path / "plain"}
    _, inputs = adapter_plan(adapted, adapter_recipe(adapted, held_out_share=0.5))
    for key, method in (("merge", "somf"), ("plain_fusion", "task_arithmetic")):
        own = {**content, "merge_method": method, "parameters": {}}
        if method == "somf":
            own["parameters"]["mask"] = str(out / "somf")
        file = tiny.write_recipe(tmp_path / f"{method}.yml", own)
        cache = ("--lora-merge-cache", adapted / "cache")
        result = tiny.invoke("mergekit-yaml", file, folders[key], *cache)
        assert result.exit_code == 0, result.output
        model = AutoModelForCausalLM.from_pretrained(adapted / "base", dtype=torch.float32).eval()
        # Of Llama, mergekit's own methods don't know biases, which no adapter here changes.
        model.load_state_dict(tiny.tensors_of(folders[key]), strict=False)
        found = preference_margins(model, inputs.data.held_out, batch_size=8)
        recorded = json.loads((out / "somf" / "somf.json").read_text())["held_out"][key]
        assert recorded["margin"] == pytest.approx(sum(found) / len(found), abs=1e-4)
    weights = tiny.tensors_of(folders["merge"])
    for name, weight in tiny.tensors_of(out).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_it_takes_less_memory(adapted):
    needs = {}
    for precision in (None, "8bit", "4bit"):
        machine = {"micro_batch_size": 1, "precision": "float32", "base_precision": precision}
        planned, inputs = adapter_plan(adapted, adapter_recipe(adapted), "factored", **machine)
        needs[precision] = forecast(planned, inputs.data).memory
    layers = sum(
        weight.numel()
        for name, weight in tiny.tensors_of(adapted / "base").items()
        if name.endswith("_proj.weight")
    )
    assert needs[None] - needs["8bit"] == pytest.approx(2.99 * layers, rel=0.01)
    assert needs["8bit"] - needs["4bit"] == pytest.approx(0.49 * layers, rel=0.01)


def test_what_can_not_be_is_said_before_anything_is_loaded(adapted, tmp_path, monkeypatch):
    content = adapter_recipe(adapted)
    few_bits = ("--base-precision", "4bit")
    result = command("check", adapted, content, tmp_path, *few_bits, "--engine", "streaming")
    assert result.exit_code == 1
    assert "--base-precision 4bit (SOMF_BASE_PRECISION) is for the factored engine" in result.output
    assert "and --engine streaming was asked for" in result.output
    other = adapter(adapted / "base", tmp_path / "dora", 3, **FIRST, use_dora=True)
    with_dora = adapter_recipe(adapted, adapted / "first", other)
    result = command("check", adapted, with_dora, tmp_path, *few_bits)
    assert result.exit_code == 1
    assert "Leave --base-precision (SOMF_BASE_PRECISION) out" in result.output
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    content["parameters"]["granularity"] = "rows"
    result = command("check", adapted, content, tmp_path, *few_bits)
    assert result.exit_code == 1
    content["parameters"]["granularity"] = "row"
    result = command("check", adapted, content, tmp_path, *few_bits)
    assert result.exit_code == 1
    assert "pip install 'somf-mergekit[few-bits]'" in result.output


def test_the_comparison_must_fit_too(adapted, monkeypatch):
    content = adapter_recipe(adapted, held_out_share=0.5)
    planned, inputs = adapter_plan(adapted, content, base_precision="4bit")
    free = iter([1 << 40, 1])
    monkeypatch.setattr(machine, "free_memory", lambda device: next(free))
    with pytest.raises(RecipeError) as error:
        forecast(planned, inputs.data)
    assert "held-out pairs are compared with the base as it is" in error.value.message
    assert "does not fit in memory: factored needs about" in error.value.message
    assert "`held_out_share: 0` leaves the comparison out" in error.value.message


@PRECISIONS
def test_nothing_is_logged_in_each_step(adapted, tmp_path, precision, caplog):
    adapters_learned(adapted, tmp_path, machine={"base_precision": precision}, max_steps=1)
    assert [record for record in caplog.records if "bitsandbytes" in record.name] == []
