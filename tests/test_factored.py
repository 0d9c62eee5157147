"""Adapters that stay factored while a mask is learned: the mask of their whole products."""

import json
import math
import sys

import pytest
import tiny
import torch
from safetensors.torch import save_file
from setups import FIRST, adapter, adapter_plan, adapter_recipe, adapters_learned
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from somf_mergekit import MaskSet
from somf_mergekit.common import machine
from somf_mergekit.common.errors import RecipeError
from somf_mergekit.learner.engine import ResidentEngine
from somf_mergekit.prepass.forecast import forecast


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": "row"},
        {"granularity": "column"},
        {"granularity": "head", "mask_noise": "none"},
        {"granularity": "row_column"},
        {"granularity": "tensor", "mask_rescale": "none"},
        {"mask_sharing": "per_model", "granularity": "row", "reference": "redrawn"},
        {"mask_sharing": "per_model", "granularity": "row_column", "reference": "base"},
        {"optimizer": "adamw", "objective": "dpo", "granularity": "row_column"},
        {"optimizer": "adamw", "mask_sharing": "per_model", "granularity": "column"},
        {"fusion": "linear", "normalize": True, "granularity": "row", "reference": "merged"},
        {"exclude": "down_proj, v_proj", "granularity": "row"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_the_trajectory_is_that_of_whole_task_vectors(adapted, tmp_path, changes):
    losses, logits = adapters_learned(adapted, tmp_path, engine="resident", **changes)
    own_losses, own_logits = adapters_learned(adapted, tmp_path, **changes)
    torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-5)
    assert len(own_logits) == len(logits)
    moved = torch.cat([own.flatten() for own in logits])
    found = torch.cat([own.flatten() for own in own_logits])
    assert moved.abs().max() > 0.1
    # signSGD turns the last digits of a gradient that is next to zero into a step.
    assert ((found - moved).abs() > 1e-3).float().mean() < 0.01


def test_a_merge_of_two_adapters(adapted, tmp_path, monkeypatch):
    """It is chosen and named, learns the mask that whole task vectors give, and merges with it."""
    content = adapter_recipe(
        adapted, granularity="row_column", mask_sharing="per_model", held_out_share=0.5, max_steps=2
    )
    masks, weights, compared = {}, {}, {}
    for engine, options in (("factored", {}), ("resident", {"SOMF_ENGINE": "resident"})):
        out = tmp_path / engine
        file = tiny.write_recipe(tmp_path / "recipe.yml", content)
        cache = ("--lora-merge-cache", adapted / "cache")
        with monkeypatch.context() as environment:
            for name, value in options.items():
                environment.setenv(name, value)
            result = tiny.invoke("mergekit-yaml", file, out, *cache)
        assert result.exit_code == 0, result.output
        assert f"somf: {engine}: needs about" in result.output
        assert "multiplied out" not in result.output
        masks[engine], weights[engine] = MaskSet.open(out / "somf"), tiny.tensors_of(out)
        assert masks[engine].provenance["learned_with"]["engine"] == engine
        compared[engine] = masks[engine].provenance["held_out"]
    for key in ("plain_fusion", "merge"):
        assert compared["factored"][key] == pytest.approx(compared["resident"][key], abs=1e-3)
    assert masks["factored"].models == masks["resident"].models
    for (_, one), (_, other) in zip(
        masks["factored"].each(), masks["resident"].each(), strict=True
    ):
        assert one.names() == other.names()
        assert len(one.names()) == 2 * 5
        for name in one.names():
            apart = (one.entries(name) - other.entries(name)).abs()
            assert (apart > 2 / 255).float().mean() < 0.02
    for name, weight in weights["resident"].items():
        torch.testing.assert_close(weights["factored"][name], weight, rtol=1e-3, atol=1e-3)


OTHER_ADAPTERS = {
    "dora": ({"use_dora": True}, "more than the A and B of a LoRA"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "more than the A and B of a LoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "more than the A and B of a LoRA"),
    "biases": ({"bias": "lora_only"}, "more than the A and B of a LoRA"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head.weight, a joined or tied"),
}
OTHER_RECIPES = {
    "entries": ({"granularity": "weight"}, "a mask with an entry for each weight"),
    "ties": ({"fusion": "ties"}, "the fusion ties needs whole task vectors"),
    "scaled base": ({"fusion": "linear", "normalize": False}, "the fusion scales the base's"),
}


def engine_line(root, content, folder, *options):
    """The line of `check` that names the engine."""
    file = tiny.write_recipe(folder / "recipe.yml", content)
    cache = ("--lora-merge-cache", folder / "cache")
    result = tiny.invoke("mergekit-somf", "check", file, *cache, *options)
    assert result.exit_code == 0, result.output
    return next(line for line in result.output.splitlines() if "engine:" in line)


@pytest.mark.parametrize("kind", [*OTHER_ADAPTERS, *OTHER_RECIPES])
def test_what_can_not_stay_factored_is_multiplied_out(kind, adapted, tmp_path):
    changes, why = {**OTHER_ADAPTERS, **OTHER_RECIPES}[kind]
    models, parameters = [adapted / "first"], changes
    if kind in OTHER_ADAPTERS:
        parameters = {}
        models.append(adapter(adapted / "base", tmp_path / "other", 3, **{**FIRST, **changes}))
    else:
        models.append(adapted / "second")
    content = adapter_recipe(adapted, *models, **parameters)
    line = engine_line(adapted, content, tmp_path)
    assert line.split()[1] == "resident:"
    assert f"; adapters are multiplied out: {'' if kind in OTHER_RECIPES else models[1]}" in line
    assert why in line
    # Asked for another engine, nobody wonders.
    assert "adapters" not in engine_line(adapted, content, tmp_path, "--engine", "streaming")
    planned, inputs = adapter_plan(adapted, content, "factored")
    with pytest.raises(RecipeError, match="the factored engine can't learn this mask: "):
        forecast(planned, inputs.data)


def test_masks_that_learning_starts_from_and_masks_that_stay(adapted, tmp_path):
    content = adapter_recipe(adapted, mask_sharing="per_model", max_steps=2)
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    cache = ("--lora-merge-cache", adapted / "cache")

    def learned(folder, *options):
        result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / folder, *cache, *options)
        assert result.exit_code == 0, result.output
        return MaskSet.open(tmp_path / folder), result.output

    start, _ = learned("start")
    for model in content["models"]:
        model["parameters"] |= {"mask": str(tmp_path / "start"), "learn": True}
    tiny.write_recipe(file, content)
    further, said = learned("further")
    assert "factored: needs about" in said
    expected, _ = learned("expected", "--engine", "resident")
    found = [
        torch.cat([own.entries(name).flatten() for _, own in masks.each() for name in own.names()])
        for masks in (start, further, expected)
    ]
    moved, apart = ((found[1] - other).abs() for other in (found[0], found[2]))
    assert moved.mean() > 0.01
    assert (apart > 2 / 255).float().mean() < 0.01
    content["models"][0]["parameters"]["learn"] = False
    line = engine_line(adapted, content, tmp_path)
    assert "multiplied out: not every model learns its mask" in line


def test_an_adapter_with_nan_is_reported_by_its_weights(adapted, tmp_path):
    place = adapter(adapted / "base", tmp_path / "broken", 1, **FIRST)
    tensors = tiny.tensors_of(place)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    file = tiny.write_recipe(tmp_path / "recipe.yml", adapter_recipe(adapted, place))
    cache = ("--lora-merge-cache", tmp_path / "cache")
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask", *cache)
    assert result.exit_code == 1
    assert "has NaN or infinite entries: the checkpoint is damaged" in result.output


def test_models_that_are_no_adapters_are_not_spoken_of(family, family_recipe, tmp_path):
    assert "adapters" not in engine_line(family, family_recipe(granularity="row"), tmp_path)
    with_adapter = adapter_recipe(family, adapter(family / "base", tmp_path / "first", 1, **FIRST))
    line = engine_line(family, with_adapter, tmp_path)
    assert line.split()[1] == "factored:"
    with_adapter["models"].append({"model": str(family / "math"), "parameters": {"weight": 0.5}})
    line = engine_line(family, with_adapter, tmp_path)
    assert f"multiplied out: {family / 'math'} is no adapter on the base model" in line


def test_the_base_and_the_ranks_are_what_it_needs(adapted):
    needs = {}
    for engine in ("factored", "resident"):
        planned, inputs = adapter_plan(
            adapted, adapter_recipe(adapted), engine, micro_batch_size=1, precision="bfloat16"
        )
        needs[engine] = forecast(planned, inputs.data).memory
    assert needs["factored"] < needs["resident"]
    # In float32 and in bfloat16, of more than the rank in adapters.
    weights = sum(tensor.numel() for tensor in tiny.tensors_of(adapted / "base").values())
    assert needs["resident"] - needs["factored"] < 10 * weights


@pytest.mark.parametrize("few_bits", [None, "4bit"])
def test_layers_that_are_computed_again_learn_the_same(adapted, tmp_path, few_bits, monkeypatch):
    calls = []
    real = LlamaDecoderLayer.forward

    def counted(self, *arguments, **keywords):
        calls.append(torch.is_grad_enabled())
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    own = {"machine": {"base_precision": few_bits}, "granularity": "row_column"}
    found = adapters_learned(adapted, tmp_path, **own)
    once = sum(calls)
    calls.clear()
    again = adapters_learned(adapted, tmp_path, forecast_as={"recomputes": True}, **own)
    assert sum(calls) == 2 * once > 0
    assert again[0] == found[0]
    assert all(map(torch.equal, again[1], found[1]))


def test_layers_are_computed_again_where_activations_would_not_fit(adapted, tmp_path, monkeypatch):
    planned, inputs = adapter_plan(adapted, adapter_recipe(adapted), "factored")
    one_pair = tiny.on_machine(planned, engine="factored", micro_batch_size=1)
    needed = forecast(one_pair, inputs.data).memory
    lines = {}
    for usable in (needed, needed - 1):
        free = math.ceil(usable / 0.9)
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        lines[usable] = engine_line(adapted, adapter_recipe(adapted), tmp_path)
        assert lines[usable].split()[1] == "factored:"
    what = "to save memory, backward passes compute each layer again"
    assert [what in line for line in lines.values()] == [False, True]


@pytest.mark.slow
def test_learning_goes_on_on_another_engine(adapted, tmp_path, monkeypatch):
    """What is learned is the same state, so that a run may begin on one and end on the other."""
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    content = adapter_recipe(adapted, optimizer="adamw", max_steps=6)
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    cache = ("--lora-merge-cache", adapted / "cache")

    def learned(folder, *options):
        return tiny.invoke("mergekit-somf", "learn", file, tmp_path / folder, *cache, *options)

    assert learned("whole").exit_code == 0
    real = ResidentEngine.learn

    def failing(self, parts, step, multiplier):
        if step == 3:
            raise MemoryError
        real(self, parts, step, multiplier)

    for engine in ("factored", "resident"):
        with monkeypatch.context() as without_memory:
            without_memory.setattr(ResidentEngine, "learn", failing)
            stopped = learned(engine)
        assert "factored: needs about" in stopped.output
        assert "the memory was not enough for step 4" in stopped.output
        ended = learned(engine, "--engine", engine)
        assert ended.exit_code == 0, ended.output
        assert "going on after step 3" in ended.output
    masks = {name: MaskSet.open(tmp_path / name) for name in ("whole", "factored", "resident")}
    for name in masks["whole"].names():
        entries = masks["whole"].entries(name)
        assert torch.equal(masks["factored"].entries(name), entries)
        torch.testing.assert_close(masks["resident"].entries(name), entries, rtol=0, atol=2 / 255)


def test_under_autocast_it_learns_alike(adapted, tmp_path):
    losses, _ = adapters_learned(adapted, tmp_path)
    in_bfloat16, _ = adapters_learned(adapted, tmp_path, machine={"precision": "bfloat16"})
    assert in_bfloat16 != losses
    assert in_bfloat16 == pytest.approx(losses, abs=0.05)


@pytest.mark.slow
def test_several_processes_learn_it_together(adapted, tmp_path):
    content = adapter_recipe(adapted, granularity="row_column", mask_sharing="per_model")
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    command = [file, "--lora-merge-cache", adapted / "cache"]
    env = {"SOMF_PRECISION": "float32", "ACCELERATE_USE_CPU": "1"}
    ours = ["-m", "somf_mergekit", "learn"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for name, started in (("one", ours), ("two", [*launcher, *ours])):
        ended = tiny.run(sys.executable, *started, *command, tmp_path / name, env=env)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("factored: needs about") == 1
        rows = (tmp_path / name / "training.jsonl").read_text().splitlines()
        found[name] = [json.loads(row)["loss"] for row in rows]
    assert found["two"] == pytest.approx(found["one"], rel=1e-4, abs=1e-4)
