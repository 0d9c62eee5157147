"""A mask for each model: learned together or alone, put together without learning, passed on."""

import json
import shutil

import pytest
import tiny
import torch

from somf_mergekit import MaskSet
from somf_mergekit.mask.writing import write_packed_masks

WEIGHTS = {"math": 0.5, "code": 0.5}


def expected_merge(family, masks, weights=WEIGHTS, rescale="mean"):
    """theta_0 + sum of w_i (theta_i - theta_0) * m_i / mean(m_i), tensor by tensor."""
    base = tiny.tensors_of(family / "base")
    models = {model: tiny.tensors_of(family / model) for model in weights}
    merged = {}
    for name, start in base.items():
        merged[name] = start.clone()
        for model, weight in weights.items():
            own = factor(*masks[model], name, rescale)
            merged[name] += weight * (models[model][name] - start) * own
    return merged


def factor(masks, model, name, rescale):
    """What a task vector is multiplied by: its mask over the mean, 1 without a mask."""
    if masks is None or name not in masks.of(model):
        return torch.ones(1)
    mask = masks.probabilities(name, model=model)
    return mask / mask.mean() if rescale == "mean" else mask


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def masks_of(folder, family, *models):
    masks = MaskSet.open(folder)
    return {model: (masks, str(family / model)) for model in models}


def composed(family, masks, weights=WEIGHTS, **parameters):
    """A recipe in which each model has the mask that ``masks`` names, or none."""
    content = tiny.recipe(family / "base", [family / m for m in weights], **parameters)
    for item, (model, weight) in zip(content["models"], weights.items(), strict=True):
        item["parameters"] = {"weight": weight}
        if model in masks:
            item["parameters"]["mask"] = str(masks[model])
    return content


def learned_alone(family, model, folder, **parameters):
    values = {
        "safety_dataset": str(family / "pairs.jsonl"),
        "max_steps": 3,
        "learning_rate": 0.5,
        "batch_size": 4,
        "max_length": 48,
        "mask_noise": "none",
    }
    content = tiny.recipe(family / "base", [family / model], **values | parameters)
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", content)
    result = tiny.invoke("mergekit-somf", "learn", file, folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def alone(family, tmp_path_factory):
    """A mask for each specialist, each learned without the other."""
    root = tmp_path_factory.mktemp("alone")
    return {model: learned_alone(family, model, root / model) for model in WEIGHTS}


@pytest.mark.parametrize("granularity", ["weight", "row", "row_column", "head"])
def test_masks_of_all_models_are_learned_together(family, family_recipe, tmp_path, granularity):
    out = tmp_path / "out"
    content = family_recipe(mask_sharing="per_model", granularity=granularity)
    found = tiny.merged(content, out)
    masks = MaskSet.open(out)
    assert [*masks.models] == [str(family / model) for model in ("code", "math")]
    assert_close(found, expected_merge(family, masks_of(out, family, *WEIGHTS)))
    one, other = (masks.of(model) for model in masks.models)
    assert one.names() == other.names() == masks.names() == sorted(found)
    moved = [(own.entries(n) - 0.5).abs().max() for own in (one, other) for n in own.names()]
    assert max(moved) > 0.02
    assert any(not torch.equal(one.entries(n), other.entries(n)) for n in one.names())
    if granularity == "row_column":
        name = "model.layers.0.mlp.up_proj.weight"
        rows, columns = found[name].shape
        assert one.entries(name).shape == (rows + columns,)
        row, column = one.entries(name).split([rows, columns])
        assert torch.equal(one.probabilities(name), row[:, None] * column)
        assert one.entries("model.embed_tokens.weight").dim() == 2
    record = masks.provenance
    assert record["entries"] == sum(o.entries(n).numel() for o in (one, other) for n in o.names())
    with pytest.raises(ValueError, match="say of which"):
        masks.probabilities(masks.names()[0])
    again = tiny.invoke("mergekit-yaml", tmp_path / "out.yml", out)
    assert "reusing the mask" in again.output
    for command in ("inspect", "verify"):
        shown = tiny.invoke("mergekit-somf", command, out)
        assert shown.exit_code == 0, shown.output
    assert "0 wrong, 0 not checked" in shown.output
    report = json.loads((out / "somf/report.json").read_text())
    assert {*report["mask"]["models"]} == {*masks.models}
    total = report["mask"]["models"][masks.models[0]]["total"]
    assert total["entries"] == sum(one.entries(n).numel() for n in one.names())
    assert f"### The mask of {masks.models[1]}" in (out / "somf/report.md").read_text()


def test_a_set_is_used_split_and_packed_as_the_masks_that_it_has(family, family_recipe, tmp_path):
    out = tmp_path / "out"
    found = tiny.merged(family_recipe(mask_sharing="per_model"), out)
    # A model is known by what is in its files.
    shutil.copytree(family / "math", tmp_path / "renamed")
    models = [tmp_path / "renamed", family / "code"]
    content = tiny.recipe(family / "base", models, mask=str(out))
    again = tiny.merged(content, tmp_path / "again")
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert tiny.invoke("mergekit-somf", "verify", tmp_path / "again").exit_code == 0
    # Where they are, they are used for another merge too.
    both = tiny.recipe(family / "base", [family / "math", family / "code"], mask=str(out))
    same = tiny.merged(both, out)
    assert all(torch.equal(found[name], same[name]) for name in found)
    assert not (out / "somf.before").exists()
    split = tiny.invoke("mergekit-somf", "split", out, tmp_path / "split")
    assert split.exit_code == 0, split.output
    masks = {model: tmp_path / "split" / model for model in WEIGHTS}
    for model, place in masks.items():
        assert MaskSet.open(place).problems() == []
        assert {*MaskSet.open(place).provenance["models"]} == {
            str(family / "base"),
            str(family / model),
        }
    third = tiny.merged(composed(family, masks), tmp_path / "third")
    assert all(torch.equal(found[name], third[name]) for name in found)
    packed = tiny.invoke("mergekit-somf", "pack", out, tmp_path / "packed")
    assert packed.exit_code == 0, packed.output
    bits, soft = MaskSet.open(tmp_path / "packed"), MaskSet.open(out)
    for model in soft.models:
        for name in soft.of(model).names():
            expected = (soft.probabilities(name, model) > 0.5).float()
            assert torch.equal(bits.probabilities(name, model), expected)


@pytest.mark.parametrize("fusion", ["task_arithmetic", "linear", "ties", "dare_linear"])
def test_masks_that_were_learned_alone_are_put_together(family, alone, tmp_path, fusion):
    values = {"fusion": fusion, **({"density": 0.5} if fusion in ("ties", "dare_linear") else {})}
    found = tiny.merged(composed(family, alone, **values), tmp_path / "out")
    swapped = {model: WEIGHTS[model] for model in reversed(WEIGHTS)}
    content = composed(family, alone, weights=swapped, **values)
    other = tiny.merged(content, tmp_path / "swapped")
    assert all(torch.equal(found[name], other[name]) for name in found)
    masks = {model: (MaskSet.open(alone[model]), None) for model in WEIGHTS}
    if fusion in ("task_arithmetic", "linear"):
        assert_close(found, expected_merge(family, masks))
    # A merge knows whose masks it was made with.
    together = MaskSet.open(tmp_path / "out")
    assert [*together.models] == sorted(str(family / model) for model in WEIGHTS)
    for model in WEIGHTS:
        own = together.of(str(family / model))
        for name in own.names():
            assert torch.equal(own.entries(name), masks[model][0].entries(name))
    record = json.loads((tmp_path / "out/somf/somf.json").read_text())
    assert record["masks"][str(family / "math")]["source"] == str(alone["math"])
    checked = tiny.invoke("mergekit-somf", "verify", tmp_path / "out")
    assert checked.exit_code == 0, checked.output


def test_three_models_come_in_any_order(family, alone, tmp_path):
    alone = {**alone, "unaligned": learned_alone(family, "unaligned", tmp_path / "third")}
    weights = {"unaligned": 0.3, "math": 0.6, "code": 0.7}
    found = tiny.merged(composed(family, alone, weights=weights), tmp_path / "out")
    turned = {model: weights[model] for model in ("code", "math", "unaligned")}
    other = tiny.merged(composed(family, alone, weights=turned), tmp_path / "turned")
    assert all(torch.equal(found[name], other[name]) for name in found)


def test_a_model_without_a_mask_is_merged_plainly(family, alone, tmp_path):
    found = tiny.merged(composed(family, {"math": alone["math"]}), tmp_path / "out")
    masks = {"math": (MaskSet.open(alone["math"]), None), "code": (None, None)}
    assert_close(found, expected_merge(family, masks))
    assert [*MaskSet.open(tmp_path / "out").models] == [str(family / "math")]
    assert tiny.invoke("mergekit-somf", "verify", tmp_path / "out").exit_code == 0


def test_a_packed_mask_goes_with_another(family, alone, tmp_path):
    write_packed_masks(tmp_path / "bits", MaskSet.open(alone["math"]))
    masks = {"math": tmp_path / "bits", "code": alone["code"]}
    found = tiny.merged(composed(family, masks, mask_rescale="none"), tmp_path / "out")
    opened = {model: (MaskSet.open(place), None) for model, place in masks.items()}
    assert_close(found, expected_merge(family, opened, rescale="none"))
    inspected = tiny.invoke("mergekit-somf", "inspect", tmp_path / "out").output
    assert f"mask of {family / 'math'}:" in inspected
    assert "| 0.000 | 1.000 |" in inspected


@pytest.mark.parametrize("fusion", ["task_arithmetic", "ties"])
def test_a_given_mask_stays_while_another_is_learned(
    family, alone, family_recipe, tmp_path, fusion
):
    content = family_recipe(fusion=fusion, granularity="row", learning_rate=0.5)
    content["models"][0]["parameters"]["mask"] = str(alone["math"])
    found = tiny.merged(content, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    given, learned = (masks.of(str(family / model)) for model in WEIGHTS)
    before = MaskSet.open(alone["math"])
    assert all(torch.equal(given.entries(n), before.entries(n)) for n in before.names())
    assert max((learned.entries(n) - 0.5).abs().max() for n in learned.names()) > 0.1
    if fusion == "task_arithmetic":
        assert_close(found, expected_merge(family, masks_of(tmp_path / "out", family, *WEIGHTS)))
    again = tiny.invoke("mergekit-yaml", tmp_path / "out.yml", tmp_path / "out")
    assert "reusing the mask" in again.output


def test_a_mask_is_learned_on_from_where_it_is(family, alone, family_recipe, tmp_path):
    content = family_recipe(mask_sharing="per_model", granularity="row", max_steps=0)
    content["models"][0]["parameters"] |= {"mask": str(alone["math"]), "learn": True}
    tiny.merged(content, tmp_path / "start")
    masks, before = MaskSet.open(tmp_path / "start"), MaskSet.open(alone["math"])
    own = masks.of(str(family / "math"))
    assert all(torch.equal(own.entries(n), before.entries(n)) for n in before.names())
    other = masks.of(str(family / "code"))
    assert all(torch.all((other.entries(n) - 0.5).abs() < 0.01) for n in other.names())
    content["parameters"] |= {"max_steps": 2, "learning_rate": 0.5}
    tiny.merged(content, tmp_path / "out")
    own = MaskSet.open(tmp_path / "out").of(str(family / "math"))
    moved = [(own.entries(n) - before.entries(n)).abs().max() for n in before.names()]
    assert 0.02 < max(moved) < 0.3


@pytest.fixture
def refusals(family, alone, family_recipe, tmp_path):
    def wrong(change, **parameters):
        content = composed(family, alone, **parameters)
        change(content)
        return tiny.refused(content, tmp_path)

    return wrong


def test_a_mask_of_another_model_is_refused_unless_it_is_meant(family, alone, refusals, tmp_path):
    def swap(content):
        content["models"][0]["parameters"]["mask"] = str(alone["code"])

    said = refusals(swap)
    assert f"mask {alone['code']} was learned for {family / 'code'}, not for" in said
    assert "mask_transfer: true" in said
    content = composed(family, alone, mask_transfer=True)
    swap(content)
    found = tiny.merged(content, tmp_path / "out")
    code = MaskSet.open(alone["code"])
    assert_close(found, expected_merge(family, {"math": (code, None), "code": (code, None)}))


def test_a_mask_of_another_base_is_refused(family, alone, tmp_path):
    content = composed(family, {"math": alone["math"]}) | {"base_model": str(family / "unaligned")}
    assert "was learned on another base than" in tiny.refused(content, tmp_path)


def test_what_can_not_be_learned_or_used_is_said_early(family, alone, refusals):
    pairs = str(family / "pairs.jsonl")

    def of_base(content):
        content["models"].append({"model": str(family / "base"), "parameters": {"mask": "x"}})

    def asked(content):
        content["models"][0]["parameters"]["learn"] = True

    assert "is base_model, which has no task vector" in refusals(of_base)
    assert "safety_dataset is missing: name preference pairs to learn the masks on" in refusals(
        asked
    )
    assert "no model's mask is learned" in refusals(lambda c: None, safety_dataset=pairs)
    said = refusals(asked, safety_dataset=pairs, granularity="weight")
    assert "granularity: weight does not fit the mask" in said

    def both(content):
        for item in content["models"]:
            item["parameters"]["learn"] = True

    assert "they can't start from different ones" in refusals(both, safety_dataset=pairs)
    assert "is not true or false" in refusals(
        lambda c: c["models"][0]["parameters"].update(learn="yes")
    )
    assert "mask_sharing: 'each' is not" in refusals(lambda c: None, mask_sharing="each")

    # The top's mask is that of every model which has none of its own.
    said = refusals(lambda c: c["models"][1]["parameters"].update(mask="/nowhere"))
    assert "mask /nowhere: no such mask" in said


def test_a_set_has_no_mask_for_a_model_that_it_does_not_know(family, alone, tmp_path):
    tiny.merged(composed(family, alone), tmp_path / "two")
    weights = {**WEIGHTS, "unaligned": 0.2}
    content = composed(family, {}, weights=weights, mask=str(tmp_path / "two"))
    said = tiny.refused(content, tmp_path)
    assert "was learned for" in said
    assert str(family / "unaligned") in said
