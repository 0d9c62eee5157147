"""Each architecture from learning to the loaded merged model, on two random layers."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.architectures import WEIGHTS, inputs, made_models, measured, preference_margin
from benchmarks.families import FAMILIES
from somf_mergekit import MaskSet, learn
from somf_mergekit.common.model_classes import auto_class
from somf_mergekit.mask.granularity import Storage, mask_layout, weight_storage

# What the specialists change: all but the norms of layer 1 and after it, and untied heads.
CHANGED = {
    "first": (".0.", "embed", "wte", "wpe"),
    "second": ("attn", "attention", "mlp"),
}
MANY = {"num_local_experts": 32, "num_experts_per_tok": 1}
# Names of a checkpoint that transformers changes when it loads it.
LOADED_AS = {"embed_out.weight": "lm_head.weight"}
if "embed_out.weight" in transformers.GPTNeoXForCausalLM._tied_weights_keys:
    # Releases before the head was renamed.
    LOADED_AS = {}
PAGE = Path(__file__).parents[1] / "docs/architectures.md"


def saved_family(architecture, folder):
    """Save a base and two specialists; return them by name."""
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    config = FAMILIES[architecture].made(len(tokenizer))
    models = {"base": AutoModelForCausalLM.from_config(config)}
    for seed, (name, changed) in enumerate(CHANGED.items(), start=1):
        models[name] = tiny.perturbed(models["base"], seed, names=changed)
    for name, model in models.items():
        tiny.save_model(model, tokenizer, folder / name)
        if architecture == "GPT-NeoX":
            add_buffers(folder / name)
    return models


def add_buffers(folder):
    """Add what older versions of transformers saved with GPT-NeoX, and mergekit asks for."""
    tensors = tiny.tensors_of(folder)
    for layer in (0, 1):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9).half()
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run_merge(folder, family, dtype="float32", **parameters):
    recipe = tiny.recipe(
        folder / "base",
        [folder / name for name in WEIGHTS],
        weights=list(WEIGHTS.values()),
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        learning_rate=0.1,
        batch_size=4,
        max_length=48,
        **parameters,
    )
    file = tiny.write_recipe(folder / "recipe.yml", {**recipe, "dtype": dtype})
    return tiny.invoke("mergekit-yaml", file, folder / "out")


def loaded_masks(masks, model):
    """The masks by the names of the loaded model's parameters; tied ones under each name."""
    places = dict(model.named_parameters(remove_duplicate=False))
    by_place = {id(places[LOADED_AS.get(n, n)]): masks.probabilities(n) for n in masks.names()}
    return {n: by_place[id(place)] for n, place in places.items() if id(place) in by_place}


def check_merge(models, folder):
    """Compare the loaded merge with the formula; return its masks."""
    merged = AutoModelForCausalLM.from_pretrained(folder / "out")
    masks = MaskSet.open(folder / "out")
    by_name = loaded_masks(masks, merged)
    base = models["base"].state_dict()
    task_vectors = {
        model: {name: value - base[name] for name, value in models[model].state_dict().items()}
        for model in WEIGHTS
    }
    found = merged.state_dict()
    assert set(found) == set(base)
    for name, start in base.items():
        mask = by_name.get(name, torch.ones(1))
        change = sum(weight * task_vectors[model][name] for model, weight in WEIGHTS.items())
        expected = start + change * mask / mask.mean()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    written = {LOADED_AS.get(name, name): name for name in tiny.tensors_of(folder / "out")}
    changed = {n for n in base if any(task_vectors[model][n].any() for model in WEIGHTS)}
    assert set(masks.names()) == {name for n, name in written.items() if n in changed}
    assert 0 < len(masks.names()) < len(written)
    assert all((masks.probabilities(n) - 0.5).abs().max() > 0.01 for n in masks.names())
    tokens = merged.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape == (1, 6)
    return masks


# One of each kind.
SAMPLE = ("Llama", "Qwen2", "Mixtral", "GPT-OSS", "Qwen3-Next", "Gemma 3")
# Their layers get more than hidden states to learn through: an embedding for each.
RESIDENT_ALONE = ("Gemma 4 E", "Gemma 4 E (text)")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in FAMILIES]
)
def test_a_family_is_learned_merged_and_loaded(name, tmp_path):
    if not hasattr(transformers, FAMILIES[name].config):
        pytest.skip("newer than this release of transformers")
    row = measured(name, *inputs(), tmp_path)
    assert row.is_right, row
    assert bool(row.streaming) == (name in RESIDENT_ALONE), row


def test_every_kind_is_in_the_sample():
    assert {FAMILIES[name].kind for name in SAMPLE} == {one.kind for one in FAMILIES.values()}


def test_experts_that_no_token_goes_to_keep_their_start(tmp_path):
    tokenizer, pairs = inputs()
    config = dataclasses.replace(FAMILIES["Mixtral"], own=FAMILIES["Mixtral"].own | MANY)
    made_models(config, tokenizer, tmp_path)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs[:1])
    steps = {"max_steps": 1, "learning_rate": 0.1, "batch_size": 1, "held_out_share": 0}
    data = {"safety_dataset": str(tmp_path / "pairs.jsonl"), "utility_weight": 0}
    recipe = tiny.recipe(tmp_path / "base", [tmp_path / "first"], **steps, **data)
    masks = learn(recipe, tmp_path / "mask")
    experts = [name for name in masks.names() if ".experts." in name]
    assert len(experts) == 2 * 32 * 3
    moved = {name for name in experts if len(masks.probabilities(name).unique()) > 1}
    assert 0 < len(moved) < len(experts)
    # The three weights of an expert go together.
    of_expert = Counter(name[: name.index(".w")] for name in moved)
    assert set(of_expert.values()) == {3}


def test_modules_of_a_wrapper_come_from_different_models(tmp_path):
    tokenizer, pairs = inputs()
    made_models(FAMILIES["Gemma 3"], tokenizer, tmp_path)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)

    def models(**weights):
        return {
            "models": [
                {"model": str(tmp_path / name), "parameters": {"weight": weight}}
                for name, weight in weights.items()
            ]
        }

    content = {
        "merge_method": "somf",
        "base_model": str(tmp_path / "base"),
        "modules": {
            "text_decoder": models(first=0.4, second=0.7),
            "multi_modal_projector": models(second=1.0),
            "vision_tower": models(first=1.0),
        },
        "parameters": {
            "safety_dataset": str(tmp_path / "pairs.jsonl"),
            "max_steps": 1,
            "batch_size": 4,
        },
        "dtype": "float32",
    }
    written = tiny.merged(content, tmp_path / "out")
    models = {name: tiny.tensors_of(tmp_path / name) for name in ("base", "first", "second")}
    assert written.keys() == models["base"].keys()
    masks = MaskSet.open(tmp_path / "out")
    seen = 0
    for name, start in models["base"].items():
        changes = {label: models[label][name] - start for label in WEIGHTS}
        if "language_model" in name:
            mask = masks.probabilities(name)
            change = (0.4 * changes["first"] + 0.7 * changes["second"]) * mask / mask.mean()
        else:
            seen += 1
            assert name not in masks
            change = changes["second" if "projector" in name else "first"]
        torch.testing.assert_close(written[name], start + change, rtol=1e-5, atol=1e-6)
    assert seen > 10


@pytest.mark.parametrize("name", ["Qwen3.5", "Gemma 3", "Mixtral"])
def test_vocabulary_and_processor_are_written_where_they_belong(name, tmp_path):
    tokenizer, pairs = inputs()
    made_models(FAMILIES[name], tokenizer, tmp_path, rows=len(tokenizer) + 24)
    safety = str(tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs))
    parameters = {"safety_dataset": safety, "max_steps": 1, "batch_size": 4}
    recipe = tiny.recipe(tmp_path / "base", [tmp_path / "first"], **parameters)
    (tmp_path / "base/preprocessor_config.json").write_text("{}")
    tiny.merged(recipe | {"tokenizer": {"source": "base"}}, tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == "{}"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.get_text_config().vocab_size == len(tokenizer)
    auto_class(config).from_pretrained(tmp_path / "out")


def test_a_wrapper_is_measured_on_text(tmp_path):
    tokenizer, pairs = inputs()
    made_models(FAMILIES["Gemma 3"], tokenizer, tmp_path)
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    places = (tmp_path / "base", tmp_path / "first")
    options = ("--pairs", file, "--safety", file, "--max-new-tokens", 2)
    result = tiny.invoke("mergekit-somf", "evaluate", *places, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    (margins,) = (row for row in found["measures"] if row["measure"] == "preference margin")
    for place in places:
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(place)
        expected = preference_margin(loaded, tokenizer, pairs)
        assert margins["models"][place.name]["value"] == pytest.approx(expected, abs=1e-5)


def test_check_counts_experts_that_are_put_together_when_loaded(tmp_path, family):
    models = saved_family("Qwen3-MoE", tmp_path)
    recipe = tiny.recipe(
        tmp_path / "base",
        [tmp_path / name for name in WEIGHTS],
        safety_dataset=str(family / "pairs.jsonl"),
        max_length=48,
        granularity="weight",
    )
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == 0, result.output
    entries = sum(weight.numel() for weight in models["base"].parameters())
    assert f"mask entries: {entries:,} at most" in " ".join(result.output.split())


def test_checkpoints_without_what_mergekit_asks_for_are_refused(tmp_path, family):
    models = saved_family("GPT-NeoX", tmp_path)
    models["first"].save_pretrained(tmp_path / "first")
    result = run_merge(tmp_path, family)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert (
        f"Error: This merge can't be made: {tmp_path / 'first'}: its checkpoint has no "
        "gpt_neox.layers.0.attention.bias" in result.output
    )
    assert "and 3 more, which mergekit takes from every model of this merge" in result.output


# Which heads' outputs each entry of a mask reaches: 4 heads, of which two share key and value where
# these are grouped.
EACH = [{0}, {1}, {2}, {3}]
SHARED = [{0, 1}, {2, 3}]
REACHED = {
    "Llama": {"q_proj": EACH, "k_proj": SHARED, "v_proj": SHARED},
    "Phi 3": {"qkv_proj": EACH + SHARED + SHARED},
    "GPT-NeoX": {"query_key_value": EACH},
    "GPT-2": {"c_attn": EACH + EACH + EACH},
}
ATTENTION = {
    "Llama": ("model.layers.1.self_attn", "o_proj"),
    "Phi 3": ("model.layers.1.self_attn", "o_proj"),
    "GPT-NeoX": ("gpt_neox.layers.1.attention", "dense"),
    "GPT-2": ("transformer.h.1.attn", "c_proj"),
}
HEADS = 4


@torch.no_grad()
def head_outputs(model, projection):
    """What attention hands to its last projection: (tokens, heads, head width)."""
    caught = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0]))
    model(torch.tensor([[0, 5, 6, 9, 7, 8]]))
    hook.remove()
    return caught[0].unflatten(-1, (HEADS, -1))


def covered_by(layout, entry, shape):
    """Truth values in the weight's shape: what one entry covers."""
    chosen = torch.zeros(layout.shape).flatten()
    chosen[entry] = 1
    return layout.expand(chosen.reshape(layout.shape)).expand(shape) > 0


@pytest.mark.parametrize("architecture", REACHED)
def test_head_masks_lie_on_the_heads(architecture, tmp_path, family):
    models = saved_family(architecture, tmp_path)
    # GPT-NeoX's truth values must also get through where no dtype casts them.
    dtype = None if architecture == "GPT-NeoX" else "float32"
    result = run_merge(tmp_path, family, granularity="head", dtype=dtype)
    assert result.exit_code == 0, result.output
    masks = check_merge(models, tmp_path)
    model = models["base"].eval()
    place, last = ATTENTION[architecture]
    projection = model.get_submodule(f"{place}.{last}")
    before = head_outputs(model, projection)
    for name, reached in REACHED[architecture].items():
        layout = masks.layout(f"{place}.{name}.weight")
        weight = model.get_parameter(f"{place}.{name}.weight")
        assert len(masks.entries(f"{place}.{name}.weight").flatten()) == len(reached)
        for entry, heads in enumerate(reached):
            stored = weight.detach().clone()
            # Not one number added to all: inputs that are normalised to mean 0 don't see that.
            weight.data[covered_by(layout, entry, weight.shape)] *= -2
            moved = (head_outputs(model, projection) - before).abs().amax(dim=(0, 2)) > 1e-6
            weight.data.copy_(stored)
            assert set(moved.nonzero().flatten().tolist()) == heads
    # The last projection takes one head's output in through the weights of one entry.
    layout = masks.layout(f"{place}.{last}.weight")
    assert len(masks.entries(f"{place}.{last}.weight").flatten()) == HEADS
    for head in range(HEADS):
        single = torch.zeros(1, 1, HEADS, before.shape[-1])
        single[:, :, head] = 1
        (gradient,) = torch.autograd.grad(projection(single.flatten(2)).sum(), projection.weight)
        assert torch.equal(gradient != 0, covered_by(layout, head, gradient.shape))


def test_biases_get_an_entry_a_head_too():
    assert mask_layout("head", "h.0.attn.c_attn.bias", (96,), Storage(8)).shape == (12,)
    neox = "gpt_neox.layers.0.attention.query_key_value.bias"
    assert mask_layout("head", neox, (96,), Storage(8)).shape == (4,)


@pytest.mark.parametrize(
    ("granularity", "name", "shape", "entries"),
    [
        ("row", "h.0.mlp.c_fc.weight", (32, 64), (1, 64)),
        ("column", "h.0.mlp.c_fc.weight", (32, 64), (32, 1)),
        ("head", "h.0.mlp.c_proj.weight", (64, 32), (1, 32)),
        ("row", "wte.weight", (300, 32), (300, 1)),
        ("row", "mlp.experts.gate_up_proj", (4, 64, 32), (4, 64, 1)),
        ("column", "mlp.experts.gate_up_proj", (4, 64, 32), (4, 1, 32)),
    ],
)
def test_rows_are_outputs_however_weights_are_stored(granularity, name, shape, entries):
    storage = Storage(8, inputs_first=True, hidden_size=32)
    assert mask_layout(granularity, name, shape, storage).shape == entries


def test_gpt2_names_do_not_make_gpt2s_storage():
    """GPTBigCode's layers have GPT-2's names and are (out, in)."""
    for config, c_attn in (
        (transformers.GPT2Config(n_embd=32, n_head=4), (32, 96)),
        (transformers.GPTBigCodeConfig(n_embd=32, n_head=4, multi_query=False), (96, 32)),
    ):
        storage = weight_storage(config)
        layout = mask_layout("head", "transformer.h.0.attn.c_attn.weight", c_attn, storage)
        assert (layout.shape[layout.axis], layout.repeat) == (12, 8)
        assert c_attn[layout.axis] == 96


def test_models_without_heads_have_no_head_width():
    assert weight_storage(transformers.MambaConfig()).head_width == 0


def test_the_documentation_lists_every_family():
    rows = re.findall(r"^\| ([^|]+?) +\| ([a-z]+) ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if row[0] != "family"] == [
        (name, family.kind) for name, family in FAMILIES.items()
    ]
