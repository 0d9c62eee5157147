"""Everything a mergekit recipe can say, said in a somf recipe; the reference is the formula."""

import json

import pytest
import tiny
import torch
from mergekit.merge_methods import merge_state_dicts

from somf_mergekit import MaskSet, register

QUERY = "model.layers.{}.self_attn.q_proj.weight"


def masked_sum(family, masks, name, weights, kept_as=None, rescale="mean"):
    """theta_0 + sum w_i delta_i m / mean(m) for one tensor."""
    kept_as = kept_as or name
    base = tiny.tensors_of(family / "base")[kept_as]
    mask = masks.probabilities(kept_as)
    factor = mask / mask.mean() if rescale == "mean" else mask
    models = {model: tiny.tensors_of(family / model)[kept_as] for model in weights}
    return base + sum(w * (models[model] - base) * factor for model, w in weights.items())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_filters_and_gradients_are_resolved_per_tensor_while_learning_too(
    family, family_recipe, tmp_path
):
    recipe = family_recipe(
        mask_rescale=[{"filter": "mlp", "value": "none"}, {"value": "mean"}],
        mask_kind=[{"filter": "norm", "value": "binary"}, {"value": "soft"}],
        learning_rate=[{"filter": "k_proj", "value": 1e-9}, {"value": 0.1}],
        init_logit=[{"filter": "v_proj", "value": 2.0}, {"value": 0.0}],
    )
    recipe["models"][0]["parameters"] = {"weight": [0.2, 0.8]}
    recipe["models"][1]["parameters"] = {
        "weight": [{"filter": "self_attn", "value": 0.0}, {"value": 0.5}]
    }
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    reported = masks.provenance["settings"]["init_logit"]
    assert reported == [{"filter": "v_proj", "value": 2.0}, {"value": 0.0}]
    for layer, math_weight in ((0, 0.2), (1, 0.8)):
        name = QUERY.format(layer)
        close(found[name], masked_sum(family, masks, name, {"math": math_weight, "code": 0.0}))
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        weights = {"math": math_weight, "code": 0.5}
        close(found[name], masked_sum(family, masks, name, weights, rescale="none"))
        keys = masks.entries(f"model.layers.{layer}.self_attn.k_proj.weight")
        assert (keys - 0.5).abs().max() <= 1 / 512
        values = masks.entries(f"model.layers.{layer}.self_attn.v_proj.weight")
        assert values.mean().item() == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.02)
        assert (values.mean() - values).abs().max() > 0.005
        norm = f"model.layers.{layer}.input_layernorm.weight"
        base, one, two = (tiny.tensors_of(family / n)[norm] for n in ("base", "math", "code"))
        mask = (masks.probabilities(norm) > 0.5).float()
        change = math_weight * (one - base) + 0.5 * (two - base)
        close(found[norm], base + change * mask / mask.mean())


def test_a_weight_of_the_recipe_changes_the_mask_that_is_learned(family_recipe, tmp_path):
    recipe = family_recipe()
    tiny.merged(recipe, tmp_path / "even")
    recipe["models"][0]["parameters"]["weight"] = [0.5, 0.0]
    tiny.merged(recipe, tmp_path / "uneven")
    even, uneven = MaskSet.open(tmp_path / "even"), MaskSet.open(tmp_path / "uneven")
    assert not torch.equal(even.entries(QUERY.format(1)), uneven.entries(QUERY.format(1)))


def slices_of(family, *ranges, weights=None):
    return [
        {
            "sources": [
                {"model": str(family / "base"), "layer_range": part},
                {"model": str(family / "math"), "layer_range": part},
            ],
            "parameters": {"weight": weight},
        }
        for part, weight in zip(ranges, weights or [0.5] * len(ranges), strict=True)
    ]


def test_slices_that_keep_the_bases_layers_are_learned(family, family_recipe, tmp_path):
    recipe = family_recipe()
    del recipe["models"]
    recipe["slices"] = slices_of(family, [0, 1], [1, 2], weights=[0.3, 0.9])
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    for layer, weight in ((0, 0.3), (1, 0.9)):
        name = QUERY.format(layer)
        close(found[name], masked_sum(family, masks, name, {"math": weight}))


def test_a_slice_may_be_of_the_base_alone(family, family_recipe, tmp_path):
    recipe = family_recipe()
    del recipe["models"]
    recipe["slices"] = slices_of(family, [0, 1], [1, 2])
    recipe["slices"][1]["sources"] = [{"model": str(family / "base"), "layer_range": [1, 2]}]
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "lacks" not in result.output
    found, base = tiny.tensors_of(tmp_path / "out"), tiny.tensors_of(family / "base")
    masks = MaskSet.open(tmp_path / "out")
    close(found[QUERY.format(0)], masked_sum(family, masks, QUERY.format(0), {"math": 0.5}))
    assert {name for name in base if torch.equal(found[name], base[name])} == {
        name
        for name in base
        if ".layers.1." in name or name in ("model.norm.weight", "lm_head.weight")
    }
    reported = json.loads((tmp_path / "out/somf/report.json").read_text())["task_vectors"]
    assert reported["groups"][-1]["before"]["norms"][str(family / "math")] > 0
    # Of the last slice's models, mergekit would read as many for the head as the first has.
    recipe["slices"] = [*recipe["slices"][1:], *slices_of(family, [1, 2])]
    recipe["slices"][0]["sources"][0]["layer_range"] = [0, 1]
    message = tiny.refused(recipe, tmp_path)
    assert f"would make model.norm.weight without {family / 'math'}" in message
    assert "the first slice has fewer sources than the last" in message


def test_stacked_layers_are_refused_for_learning_and_take_a_learned_mask(
    family, family_recipe, tmp_path
):
    file = tiny.write_recipe(tmp_path / "learn.yml", family_recipe())
    assert tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask").exit_code == 0
    recipe = family_recipe()
    del recipe["models"]
    recipe["slices"] = slices_of(family, [0, 2], [1, 2], [0, 1])
    message = tiny.refused(recipe, tmp_path)
    assert "whose output isn't a model of the base's shape" in message
    assert "model.layers.2.input_layernorm.weight is made of model.layers.1." in message
    assert "A learned mask can still be applied with the parameter `mask`" in message
    recipe["parameters"] = {"mask": str(tmp_path / "mask")}
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "mask")
    for layer, source in enumerate((0, 1, 1, 0)):
        expected = masked_sum(
            family, masks, QUERY.format(layer), {"math": 0.5}, QUERY.format(source)
        )
        close(found[QUERY.format(layer)], expected)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


def test_fewer_layers_than_the_base_are_refused_for_learning(family, family_recipe, tmp_path):
    recipe = family_recipe()
    del recipe["models"]
    recipe["slices"] = slices_of(family, [0, 1])
    assert "it has 1 layers, the base 2" in tiny.refused(recipe, tmp_path)


def test_modules(family, family_recipe, tmp_path):
    recipe = family_recipe()
    recipe["modules"] = {"default": {"slices": slices_of(family, [0, 2])}}
    del recipe["models"]
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    close(found[QUERY.format(1)], masked_sum(family, masks, QUERY.format(1), {"math": 0.5}))


@pytest.fixture
def wider(family, tmp_path):
    """A specialist with two tokens of its own, in another order of the vocabulary."""
    tokenizer = tiny.tiny_tokenizer(extra_tokens=["<x>", "<y>"])
    model = tiny.tiny_llama(7, len(tokenizer))
    tiny.save_model(model, tokenizer, tmp_path / "wider")
    return tmp_path / "wider"


@pytest.mark.parametrize(
    "tokens", [{"tokenizer": {"source": "base"}}, {"tokenizer_source": "union"}], ids=str
)
def test_embeddings_are_permuted_before_they_are_masked(
    family, family_recipe, tmp_path, wider, tokens
):
    recipe = family_recipe() | tokens
    recipe["models"][1]["model"] = str(wider)
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert masks.entries(name).shape == found[name].shape
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found[name].shape[0] == len(tokenizer)
    assert ("<x>" in tokenizer.get_vocab()) == ("tokenizer_source" in tokens)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The permuted inputs are mergekit's: what plain fusions of them add up to is masked here.
    parts = {}
    for model, weights in {"base": (0, 0), "math": (1, 0), "wider": (0, 1)}.items():
        plain = {k: v for k, v in recipe.items() if k != "parameters"}
        plain["merge_method"] = "task_arithmetic"
        plain["models"] = [
            {"model": item["model"], "parameters": {"weight": float(weight)}}
            for item, weight in zip(recipe["models"], weights, strict=True)
        ]
        parts[model] = tiny.merged(plain, tmp_path / f"plain-{model}")[name]
    mask = masks.probabilities(name)
    change = 0.5 * (parts["math"] - parts["base"]) + 0.5 * (parts["wider"] - parts["base"])
    torch.testing.assert_close(
        found[name], parts["base"] + change * mask / mask.mean(), rtol=1e-4, atol=1e-5
    )


def test_out_dtype(family, family_recipe, tmp_path):
    found = tiny.merged(family_recipe() | {"out_dtype": "bfloat16"}, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        expected = masked_sum(family, masks, name, {"math": 0.5, "code": 0.5}).bfloat16()
        assert (tensor.float() - expected.float()).abs().max() <= expected.abs().max() / 128


def test_the_base_may_be_an_adapter_too(family, family_recipe, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(family / "base"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = family_recipe()
    recipe["base_model"] = f"{family / 'base'}+{tmp_path / 'adapter'}"
    found = tiny.merged(recipe, tmp_path / "out", "--lora-merge-cache", tmp_path / "cache")
    masks = MaskSet.open(tmp_path / "out")
    name = QUERY.format(0)
    base = adapted.merge_and_unload().state_dict()[name]
    mask = masks.probabilities(name)
    models = [tiny.tensors_of(family / n)[name] for n in ("math", "code")]
    change = sum(0.5 * (model - base) for model in models)
    torch.testing.assert_close(
        found[name], base + change * mask / mask.mean(), rtol=1e-4, atol=1e-5
    )


def test_a_somf_step_feeds_another(family, family_recipe, tmp_path):
    first = {"name": "safe-math", **family_recipe()}
    first["models"] = first["models"][:1]
    second = family_recipe(seed=1)
    second["models"][0]["model"] = "safe-math"
    tiny.merged_in_steps([first, second], tmp_path)
    masks = MaskSet.open(tmp_path / "out")
    found, step = tiny.tensors_of(tmp_path / "out"), tiny.tensors_of(tmp_path / "steps/safe-math")
    first_masks = MaskSet.open(tmp_path / "steps/safe-math")
    name = QUERY.format(1)
    close(step[name], masked_sum(family, first_masks, name, {"math": 0.5}))
    base, code = (tiny.tensors_of(family / n)[name] for n in ("base", "code"))
    mask = masks.probabilities(name)
    change = 0.5 * (step[name] - base) + 0.5 * (code - base)
    close(found[name], base + change * mask / mask.mean())


@pytest.mark.parametrize(
    ("fusion", "own"),
    [("ties", {"density": 0.5}), ("dare_linear", {"density": 0.6}), ("linear", {})],
)
def test_merging_in_memory_gives_the_bits_of_the_written_merge(
    family, family_recipe, tmp_path, fusion, own
):
    written = tiny.merged(family_recipe(fusion=fusion, seed=3, **own), tmp_path / "out")
    register()
    models = {name: tiny.tensors_of(family / name) for name in ("base", "math", "code")}
    parameters = {"mask": str(tmp_path / "out"), "fusion": fusion, "seed": 3, "weight": 0.5, **own}
    found = merge_state_dicts(models, "somf", base="base", parameters=parameters)
    assert all(torch.equal(found[name], written[name]) for name in written)


def test_a_mask_is_transferred_to_models_it_was_not_learned_on(family, family_recipe, tmp_path):
    first = family_recipe()
    first["models"] = first["models"][:1]
    tiny.merged(first, tmp_path / "first")
    given = {"mask": str(tmp_path / "first"), "mask_transfer": True}
    second = family_recipe(safety_dataset=None, **given)
    second["models"] = second["models"][1:]
    found = tiny.merged(second, tmp_path / "second")
    masks = MaskSet.open(tmp_path / "second")
    for name in found:
        assert torch.equal(masks.entries(name), MaskSet.open(tmp_path / "first").entries(name))
        close(found[name], masked_sum(family, masks, name, {"code": 0.5}))
    reported = json.loads((tmp_path / "second/somf/somf.json").read_text())
    assert {*reported["models"]} == {str(family / "base"), str(family / "code")}
    assert reported["masks"][str(family / "code")]["source"] == str(tmp_path / "first")
    assert set(reported["origin"]["models"]) == {str(family / "base"), str(family / "math")}
    assert reported["origin"] == MaskSet.open(tmp_path / "first").provenance


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("parameters.temperature", [{"filter": "no_such", "value": 0.4}, {"value": 0.5}]),
        ("models[0].parameters.weight", [{"filter": "no_such", "value": 0.4}, {"value": 0.5}]),
        ("models[0].parameters.weight", {"filter": "no_such", "value": 0.4}),
    ],
)
def test_filters_that_match_no_tensor(family_recipe, tmp_path, where, value):
    recipe = family_recipe()
    if where.startswith("models"):
        recipe["models"][0]["parameters"]["weight"] = value
    else:
        recipe["parameters"]["temperature"] = value
    message = tiny.refused(recipe, tmp_path)
    if isinstance(value, list):
        assert f"{where}: no tensor has 'no_such' in its name" in message
    else:
        assert "weight is missing for" in message
