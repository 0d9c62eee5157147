"""Masking comes first, then any mergekit method fuses; learning goes through the same fusion."""

import hashlib

import pytest
import tiny
import torch
from mergekit.merge_methods import merge_tensors, registry
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    PerNonBase,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.merge_methods.easy_define import merge_method
from setups import shared

from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.common import chunks as pieces
from somf_mergekit.fusion import fuse as fusions
from somf_mergekit.fusion import fusion_methods, masked_fusion, merges
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.mask.granularity import Storage, mask_layout

# Every fusion with its own parameters, as a recipe gives them: to all models, or once.
WITH_TWO = {
    "task_arithmetic": {"weight": 0.5, "lambda": 0.9},
    "ties": {"weight": 0.6, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.6},
    "dare_ties": {"weight": 0.5, "density": 0.6, "rescale": False},
    "breadcrumbs": {"weight": 0.5, "density": 0.7, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.7, "gamma": 0.1, "int8_mask": True},
    "della": {"weight": 0.5, "density": 0.6, "epsilon": 0.2},
    "della_linear": {"weight": 0.5, "density": 0.6, "epsilon": 0.2},
    "sce": {"select_topk": 0.6},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01, "alpha": 0.3},
    "model_stock": {"filter_wise": True},
    "multislerp": {"weight": 0.5},
    "nuslerp": {"weight": 0.5},
    "linear": {"weight": 0.4, "normalize": False},
    "karcher": {},
}
WITH_ONE = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.02},
    "arcee_fusion": {},
    "passthrough": {"scale": 0.9},
}
WITHOUT_BASE = ("linear", "karcher", "passthrough")
ALL = [*((name, 2) for name in WITH_TWO), *((name, 1) for name in WITH_ONE)]


def own_parameters(fusion):
    return {**WITH_TWO, **WITH_ONE}[fusion]


def reference(fusion, base, models, factor, name="w", seed=0):
    """Mask, then fuse: mergekit's method on base + delta * factor, seeded as documented."""
    digest = hashlib.blake2b(f"fusion/{seed}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little", signed=True))
    masked = [base + (model - base) * factor for model in models]
    if fusion in WITHOUT_BASE:
        return merge_tensors(masked, fusion, parameters=own_parameters(fusion))
    return merge_tensors([base, *masked], fusion, parameters=own_parameters(fusion), base_index=0)


def group_of(models=2, shape=(12, 16), seed=0):
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    changed = [base + 0.1 * torch.randn(shape, generator=draw) for _ in range(models)]
    entries = [TensorEntry("base", base, True)]
    entries += [TensorEntry(number, tensor) for number, tensor in enumerate(changed)]
    return TensorGroup(tuple(entries), TensorMetadata(name="w")), base, changed


def values_of(fusion, models=2, **changes):
    """Parameters as the planner resolves them: those that a fusion takes per model as mappings."""
    values = {"fusion": fusion, "seed": 0}
    for spec in fusion_methods.fusion_specs(frozenset()):
        value = {**own_parameters(fusion), **changes}.get(spec.name)
        shared = spec.scope.value == "shared"
        values[spec.name] = value if shared else dict.fromkeys(range(models), value)
    return values


def recipe_of(family, fusion, models, **parameters):
    specialists = [family / name for name in ("math", "code")[:models]]
    recipe = tiny.recipe(
        family / "base",
        specialists,
        fusion=fusion,
        **{
            "max_steps": 2,
            "learning_rate": 0.1,
            "batch_size": 4,
            "max_length": 48,
            **own_parameters(fusion),
        },
        **parameters,
    )
    for model in recipe["models"]:
        del model["parameters"]
    return recipe


@pytest.mark.parametrize(("fusion", "models"), ALL, ids=[name for name, _ in ALL])
def test_every_fusion_learns_a_mask_and_writes_the_fusion_of_masked_models(
    family, tmp_path, fusion, models
):
    recipe = recipe_of(family, fusion, models, safety_dataset=str(family / "pairs.jsonl"))
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    base = tiny.tensors_of(family / "base")
    others = [tiny.tensors_of(family / name) for name in ("math", "code")[:models]]
    assert set(masks.names()) == set(base)
    for name, start in base.items():
        mask = masks.probabilities(name)
        assert (mask - 0.5).abs().max() > 0.02, f"{name} was not learned"
        expected = reference(
            fusion, start, [other[name] for other in others], mask / mask.mean(), name
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def test_registered_fusions_are_all_tested():
    assert set(fusion_methods.known_fusions()) == set(WITH_TWO) | set(WITH_ONE)


def written(weight, factor):
    found = torch.full((12, 16), torch.nan)
    weight.write(found, [[factor]])
    return found


@pytest.mark.parametrize(("fusion", "models"), ALL, ids=[name for name, _ in ALL])
@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_learning_sees_the_fusions_weights_and_gradients(fusion, models, granularity):
    group, base, changed = group_of(models)
    weight = masked_fusion.merge_of(group, values_of(fusion, models))
    layout = mask_layout(granularity, "w", (12, 16), Storage(4))
    draw = torch.Generator().manual_seed(5)
    factor = 0.5 + torch.rand(layout.shape, generator=draw)
    gradient = torch.randn(12, 16, generator=draw)
    leaf = factor.clone().requires_grad_()
    expected = reference(fusion, base, changed, leaf)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, gradient)
    torch.testing.assert_close(
        written(weight, layout.expand(factor)), expected.detach(), rtol=1e-5, atol=1e-6
    )
    (found,) = weight.factor_gradients(gradient, [factor], layout, Shard((12, 16)))
    torch.testing.assert_close(found, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "changes", "linear"),
    [
        ("task_arithmetic", {"normalize": True}, True),
        ("linear", {}, True),
        ("linear", {"normalize": True}, True),
        ("ties", {"density": 1.0}, True),
        ("ties", {"density": None}, True),
        ("ties", {"density": 0.9}, False),
        ("dare_linear", {"rescale": False}, True),
        ("dare_linear", {"rescale": None}, False),
        ("dare_ties", {}, True),
        ("breadcrumbs_ties", {"density": 1.0}, True),
        ("della", {"density": 1.0}, True),
        ("della", {}, False),
        ("sce", {}, False),
        ("karcher", {}, False),
    ],
)
def test_the_closed_form_is_used_where_the_fusion_is_linear(fusion, changes, linear):
    group, _, _ = group_of()
    values = values_of(fusion, **changes)
    assert fusions.is_linear(values) is linear
    weight = masked_fusion.merge_of(group, values)
    assert isinstance(weight, merges.LinearMerge) is linear
    draw = torch.Generator().manual_seed(3)
    for factor in (torch.ones(()), torch.rand(12, 16, generator=draw), torch.zeros(12, 16)):
        expected = fusions.fused(fusions.masked_group(group, shared(group, factor)), values)
        torch.testing.assert_close(written(weight, factor), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fusion", "models", "changes"),
    [
        ("task_arithmetic", 2, {}),
        ("task_arithmetic", 2, {"weight": 0.7, "normalize": True, "lambda": None}),
        ("linear", 2, {}),
        ("linear", 3, {"weight": 0.2, "normalize": True}),
        ("passthrough", 1, {}),
    ],
)
def test_sums_are_what_mergekit_gives_however_they_are_cut(fusion, models, changes, monkeypatch):
    group, _, _ = group_of(models)
    values = values_of(fusion, models, **changes)
    factor = torch.rand(12, 16, generator=torch.Generator().manual_seed(3))
    for mask in (factor, factor[:, :1], factor[:1], torch.ones(())):
        expected = fusions.fused(fusions.masked_group(group, shared(group, mask)), values)
        monkeypatch.setattr(pieces, "PIECE", 1 << 20)
        whole = masked_fusion.fused_masked(group, shared(group, mask), values)
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
        monkeypatch.setattr(pieces, "PIECE", 5 * 16)
        assert torch.equal(masked_fusion.fused_masked(group, shared(group, mask), values), whole)


def test_models_that_are_averaged_keep_the_base_itself():
    group, base, _ = group_of(3)
    values = values_of("linear", 3, weight=0.1, normalize=True)
    assert masked_fusion.merge_of(group, values).start is base
    halved = masked_fusion.merge_of(group, values_of("linear", 3, weight=0.2, normalize=False))
    torch.testing.assert_close(halved.start, 0.6 * base)


@pytest.mark.parametrize("density", [0.2, 0.001, 0.75, 1.0, 0.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_trimming_by_a_threshold_is_what_mergekit_sorts_out(density, rescale):
    group, base, changed = group_of(2)
    values = values_of("ties", 2, density=density, rescale=rescale)
    parameters = {**own_parameters("ties"), "density": density, "rescale": rescale}
    expected = merge_tensors([base, *changed], "ties", parameters=parameters, base_index=0)
    torch.testing.assert_close(fusions.fused(group, values), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.01])
def test_as_many_entries_are_stored_also_of_equal_ones(share):
    values = torch.tensor([0.0, 1.0, -1.0, 1.0, -2.0, 0.5, 1.0, 0.0]).view(2, 4)
    stored = fusions.largest(values, share)
    assert int(stored.sum()) == max(1, int(share * 8))
    assert values.abs()[stored].min() >= values.abs()[~stored].max()
    assert not fusions.largest(torch.zeros(3, 3), 0.5)[2].any()


@pytest.mark.parametrize("fusion", ["task_arithmetic", "linear", "passthrough"])
def test_fusing_leaves_its_inputs_as_they_were(fusion):
    models = 1 if fusion == "passthrough" else 2
    group, base, changed = group_of(models)
    before = [tensor.clone() for tensor in (base, *changed)]
    values = values_of(fusion, models, scale=None)
    factor = torch.rand(12, 16, generator=torch.Generator().manual_seed(3))
    result = masked_fusion.fused_masked(group, shared(group, factor), values)
    assert all(map(torch.equal, before, (base, *changed)))
    if fusion == "passthrough":
        torch.testing.assert_close(result, base + (changed[0] - base) * factor)


def test_ties_trims_elects_and_averages_what_the_mask_left(family, tmp_path):
    recipe = recipe_of(family, "ties", 2, safety_dataset=str(family / "pairs.jsonl"))
    found = tiny.merged(recipe, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    mask = MaskSet.open(tmp_path / "out").probabilities(name)
    base = tiny.tensors_of(family / "base")[name]
    stored = []
    for specialist in ("math", "code"):
        delta = (tiny.tensors_of(family / specialist)[name] - base) * mask / mask.mean()
        smallest = delta.abs().flatten().sort(descending=True).values[delta.numel() // 2 - 1]
        stored.append(0.6 * torch.where(delta.abs() >= smallest, delta, 0))
    sign = torch.where(stored[0] + stored[1] >= 0, 1, -1)
    agreeing = [torch.where(torch.sign(k) == sign, k, 0) for k in stored]
    weight = sum(0.6 * (torch.sign(k) == sign) for k in stored)
    expected = base + sum(agreeing) / torch.where(weight == 0, 1, weight)
    torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_random_fusions_draw_by_seed_and_tensor_and_leave_torchs_generator_alone():
    group, base, changed = group_of()
    values = values_of("dare_linear")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = fusions.fused(group, values)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, fusions.fused(group, values))
    assert not torch.equal(first, fusions.fused(group, {**values, "seed": 1}))
    other = TensorGroup(group.entries, TensorMetadata(name="other"))
    assert not torch.equal(first, fusions.fused(other, values))
    torch.testing.assert_close(first, reference("dare_linear", base, changed, torch.ones(())))


def test_parameters_left_out_for_one_model_take_the_fusions_default(family, tmp_path):
    recipe = recipe_of(family, "ties", 2, safety_dataset=str(family / "pairs.jsonl"))
    del recipe["parameters"]["density"]
    recipe["models"][0]["parameters"] = {"density": 0.5}
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    for name, base in tiny.tensors_of(family / "base").items():
        factor = masks.probabilities(name) / masks.probabilities(name).mean()
        masked = [
            base + (tiny.tensors_of(family / model)[name] - base) * factor
            for model in ("math", "code")
        ]
        expected = merge_tensors(
            [base, *masked],
            "ties",
            parameters={"weight": 0.6, "density": [0.5, 1.0]},
            base_index=0,
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def registered():
    """Register methods for one test."""
    added = []

    def add(method):
        registry.register(method)
        added.append(method.spec.name)

    yield add
    for name in added:
        del registry._METHODS[name]


def their_method(name, function):
    """A user's own method, as mergekit documents it."""

    @merge_method(name=name, contract=InputContract(base=BasePolicy.REQUIRED))
    def method(
        group: TensorGroup, strength: PerNonBase[float], twist: bool = False
    ) -> torch.Tensor:
        delta = sum(
            strength[entry.id] * (entry.tensor - group.base.tensor) for entry in group.non_base
        )
        return function(group.base.tensor + torch.tanh(delta) * (-1 if twist else 1))

    return method


def test_a_method_that_a_user_registered_fuses_too(family, tmp_path, registered):
    registered(their_method("tanh_merge", lambda tensor: tensor))
    recipe = tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        fusion="tanh_merge",
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        batch_size=4,
        max_length=48,
        twist=True,
    )
    for model, strength in zip(recipe["models"], (0.5, 2.0), strict=True):
        model["parameters"] = {"strength": strength}
    found = tiny.merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    math, code = (tiny.tensors_of(family / name) for name in ("math", "code"))
    for name, base in tiny.tensors_of(family / "base").items():
        factor = masks.probabilities(name) / masks.probabilities(name).mean()
        delta = 0.5 * (math[name] - base) * factor + 2.0 * (code[name] - base) * factor
        torch.testing.assert_close(found[name], base - torch.tanh(delta), rtol=1e-5, atol=1e-6)


def test_a_fusion_that_can_not_be_differentiated_is_refused_with_those_that_can(
    family, tmp_path, registered, family_recipe
):
    registered(their_method("frozen_merge", lambda tensor: tensor.detach()))
    recipe = family_recipe(fusion="frozen_merge", strength=0.5)
    for model in recipe["models"]:
        del model["parameters"]
    message = tiny.refused(recipe, tmp_path)
    assert "frozen_merge can't be differentiated" in message
    known = message.split("Learn with one of ", 1)[1].split(";")[0].split(", ")
    assert set(known) == set(WITH_TWO)
    # A mask that is there already needs no gradient.
    learned = tiny.write_recipe(tmp_path / "learn.yml", family_recipe())
    assert tiny.invoke("mergekit-somf", "learn", learned, tmp_path / "mask").exit_code == 0
    recipe["parameters"] = {
        "fusion": "frozen_merge",
        "strength": 0.5,
        "mask": str(tmp_path / "mask"),
    }
    assert tiny.merged(recipe, tmp_path / "given")


def test_a_fusion_whose_parameters_have_our_names_is_refused(tmp_path, registered, family_recipe):
    @merge_method(name="hot_merge", contract=InputContract(base=BasePolicy.REQUIRED))
    def method(group: TensorGroup, temperature: float = 1.0) -> torch.Tensor:
        return group.base.tensor * temperature

    registered(method)
    message = tiny.refused(family_recipe(fusion="hot_merge"), tmp_path)
    assert "hot_merge has parameters that somf has too (temperature)" in message


def test_a_fusion_that_can_not_tell_models_apart_learns_no_mask_for_each(
    family_recipe, tmp_path, registered
):
    @merge_method(name="first_alone", contract=InputContract(base=BasePolicy.REQUIRED))
    def method(group: TensorGroup) -> torch.Tensor:
        return group.base.tensor + torch.tanh(group.non_base[0].tensor - group.base.tensor)

    registered(method)
    tiny.merged(family_recipe(fusion="first_alone", max_steps=1), tmp_path / "out")
    recipe = family_recipe(fusion="first_alone", mask_sharing="per_model")
    message = tiny.refused(recipe, tmp_path)
    assert "the fusion first_alone can't tell these models apart" in message
    assert "set `mask_sharing: shared`" in message


@pytest.mark.parametrize(
    ("parameters", "weight", "said"),
    [
        ({"fusion": "slerp", "t": 0.5}, None, "slerp can't fuse 2 fine-tuned models"),
        ({"fusion": "ties"}, None, "weight is missing for"),
        ({"fusion": "ties", "gamma": 0.1}, 0.5, "gamma: unknown parameter; neither somf nor ties"),
        (
            {"fusion": "ties", "densty": 0.1},
            0.5,
            "densty: unknown parameter (did you mean 'density'",
        ),
        ({"fusion": "ties", "density": "most"}, 0.5, "'most' is not what ties takes (float)"),
        ({"fusion": "sce"}, 0.5, "models[0].parameters.weight: unknown parameter"),
        ({"fusion": "della", "density": 0.9}, 0.5, "Epsilon must be chosen such that density"),
        ({"fusion": "somf"}, 0.5, "'somf' isn't a method of mergekit that is known"),
        ({"fusion": "unheard_of"}, 0.5, "known are arcee_fusion, breadcrumbs"),
        ({"fusion": ["ties", "sce"]}, 0.5, "fusion: takes one value for all tensors"),
        ({"fusion": 7}, 0.5, "parameters.fusion: 7 is not text"),
    ],
)
def test_what_does_not_fit_the_fusion(tmp_path, family_recipe, parameters, weight, said):
    recipe = family_recipe(**parameters)
    for model in recipe["models"]:
        model["parameters"] = {"weight": weight} if weight else {}
    assert said in tiny.refused(recipe, tmp_path)


def test_too_few_models(tmp_path, family_recipe):
    recipe = family_recipe(fusion="model_stock")
    recipe["models"] = [{"model": recipe["models"][0]["model"]}]
    message = tiny.refused(recipe, tmp_path)
    assert "models: model_stock can't fuse 1 fine-tuned models" in message
    assert "at least 3 inputs; got 2 (the base among them)" in message


def test_a_required_parameter_of_the_fusion(tmp_path, family_recipe):
    recipe = family_recipe(fusion="slerp")
    recipe["models"] = [{"model": recipe["models"][0]["model"]}]
    assert "t is missing: slerp needs `t: ...`" in tiny.refused(recipe, tmp_path)


def test_a_parameter_for_all_models_stands_under_none(tmp_path, family_recipe):
    recipe = family_recipe(fusion="ties")
    recipe["models"][0]["parameters"]["normalize"] = False
    recipe["models"][1]["parameters"]["mask_kind"] = "binary"
    message = tiny.refused(recipe, tmp_path)
    assert "models[0].parameters.normalize: ties takes one for all models" in message
    assert "models[1].parameters.mask_kind: all models share one value" in message


def test_one_value_for_all_where_models_say_different_ones(tmp_path, family, family_recipe):
    recipe = family_recipe(fusion="ram")
    for model, value in zip(recipe["models"], (0.1, 0.2), strict=True):
        model["parameters"] = {"epsilon": value}
    assert "ram takes one for all models" in tiny.refused(recipe, tmp_path)
    group, _, _ = group_of()
    values = {"fusion": "ram", "seed": 0, "epsilon": {0: 0.1, 1: 0.2}}
    with pytest.raises(RecipeError, match="ram takes one epsilon for all models"):
        fusions.fused(group, values)
