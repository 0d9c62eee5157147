"""Adapters that stay factored while a mask is learned: the same mask as from their whole products."""

import contextlib
import json

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from setups import trajectory

from somf_mergekit import MaskSet
from somf_mergekit.common.errors import RecipeError
from somf_mergekit.common.process_group import ALONE
from somf_mergekit.plugin.merge_check import checked_merge
from somf_mergekit.prepass.forecast import forecast
from somf_mergekit.prepass.training import training_setup
from somf_mergekit.recipe.validate import read_recipe

FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
SECOND = {
    "r": 3,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"up_proj": 9},
}


def adapter(base, folder, seed, **options):
    """Save an adapter of a base, all of whose numbers are random."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """A base whose linear layers have biases, two adapters, pairs, and where mergekit puts them."""
    root = tmp_path_factory.mktemp("adapted")
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
    tiny.save_model(model, tokenizer, root / "base")
    adapter(root / "base", root / "first", 1, **FIRST)
    adapter(root / "base", root / "second", 2, **SECOND)
    tiny.write_jsonl(root / "pairs.jsonl", tiny.preference_rows())
    return root


def recipe_of(root, *models, **parameters):
    base = root / "base"
    values = {"max_steps": 4, "learning_rate": 0.1, "batch_size": 4, "max_length": 48}
    values |= {"safety_dataset": str(root / "pairs.jsonl"), **parameters}
    models = models or (root / "first", root / "second")
    return tiny.recipe(base, [f"{base}+{model}" for model in models], weights=[0.7, 0.4], **values)


def planned_with(root, content, engine, **machine):
    options = MergeOptions(lora_merge_cache=str(root / "cache"), quiet=True)
    checked = checked_merge(read_recipe(content), options)
    planned = tiny.on_machine(checked.planned, engine=engine, **machine)
    return planned, checked.inputs


def learned(root, engine, folder, **parameters):
    """Losses and logits of a training run on an engine."""
    planned, inputs = planned_with(
        root, recipe_of(root, **parameters), engine, micro_batch_size=2, precision="float32"
    )
    expected = forecast(planned, inputs.data)
    assert expected.engine == engine
    with contextlib.ExitStack() as ending:
        _, setup, ways = training_setup(planned, str(folder), inputs, expected, ALONE, ending)
    assert ways["engine"] == engine
    return trajectory(setup)


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
    losses, logits = learned(adapted, "resident", tmp_path, **changes)
    own_losses, own_logits = learned(adapted, "factored", tmp_path, **changes)
    torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-5)
    assert len(own_logits) == len(logits)
    moved = torch.cat([own.flatten() for own in logits])
    found = torch.cat([own.flatten() for own in own_logits])
    assert moved.abs().max() > 0.1
    # signSGD turns the last digits of a gradient that is next to zero into a step.
    assert ((found - moved).abs() > 1e-3).float().mean() < 0.01


def test_a_merge_of_two_adapters(adapted, tmp_path):
    """It is chosen and named, learns the mask that whole task vectors give, and merges with it."""
    content = recipe_of(adapted, granularity="row_column", mask_sharing="per_model")
    masks, weights = {}, {}
    for engine, options in (("factored", ()), ("resident", ("--engine", "resident"))):
        out = tmp_path / engine
        file = tiny.write_recipe(tmp_path / "recipe.yml", content)
        cache = ("--lora-merge-cache", adapted / "cache")
        result = tiny.invoke("mergekit-somf", "merge", file, out, *cache, *options)
        assert result.exit_code == 0, result.output
        assert f"somf: {engine}: needs about" in result.output
        masks[engine], weights[engine] = MaskSet.open(out / "somf"), tiny.tensors_of(out)
        assert masks[engine].provenance["learned_with"]["engine"] == engine
    assert masks["factored"].models == masks["resident"].models
    assert masks["factored"].provenance["held_out"].keys()
    for (_, one), (_, other) in zip(
        masks["factored"].each(), masks["resident"].each(), strict=True
    ):
        assert one.names() == other.names()
        for name in one.names():
            apart = (one.entries(name) - other.entries(name)).abs()
            assert (apart > 2 / 255).float().mean() < 0.02
    for name, weight in weights["resident"].items():
        torch.testing.assert_close(weights["factored"][name], weight, rtol=1e-3, atol=1e-3)
