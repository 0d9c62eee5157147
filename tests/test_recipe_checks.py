"""A recipe is read as it was meant or refused, by `check` and by the merge alike."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
import yaml

Usage = namedtuple("Usage", "total used free")


def problems_of(output):
    """The problems that a refusal lists."""
    text = output.split("Error: ", 1)[1].strip()
    first, *others = text.splitlines()
    if not others:
        return {first.split(": ", 1)[1]}
    assert first.endswith(f"{len(others)} problems")
    return {line.removeprefix("  - ") for line in others}


def refusal(text, folder, *options):
    """What both `check` and the merge say of a recipe that both refuse, before anything is read."""
    file, out = folder / "recipe.yml", folder / "out"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    found = []
    for command in (("mergekit-somf", "check", file), ("mergekit-yaml", file, out)):
        result = tiny.invoke(*command, *options)
        assert isinstance(result.exception, SystemExit), (result.output, repr(result.exception))
        assert result.exit_code == 1
        assert not out.exists()
        found.append({said.replace(f"{file}, ", "") for said in problems_of(result.output)})
    assert found[0] == found[1]
    return found[0]


HEAD = """\
merge_method: somf
base_model: BASE
dtype: float32
"""
MODELS = """\
models:
- model: MATH
  parameters: {weight: 0.5}
"""
TAIL = """\
parameters:
  safety_dataset: DATA
  max_steps: 0
"""


@pytest.fixture
def text(family):
    def make(*parts):
        found = "".join(parts)
        for word, name in (("BASE", "base"), ("MATH", "math"), ("CODE", "code")):
            found = found.replace(word, str(family / name))
        return found.replace("DATA", str(family / "pairs.jsonl"))

    return make


DOUBLE = """\
models:
- model: MATH
  parameters:
    weight:
    - {filter: mlp, value: 1, valeu: 2}
    - {value: 1}
"""
SAME_KEY = "is there twice, and the first one would be dropped"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            (HEAD, "models:\n- model: MATH\n  weight: 0.5\n", TAIL),
            "models[0].weight: unknown key; "
            "mergekit reads it under `models[0].parameters` (line 6)",
        ),
        (
            (HEAD, "models:\n- model: MATH\n  paramaters: {weight: 1}\n", TAIL),
            "models[0].paramaters: unknown key (did you mean 'parameters'?) (line 6)",
        ),
        (
            (HEAD, MODELS, "tokenizer:\n  sauce: base\n", TAIL),
            "tokenizer.sauce: unknown key (did you mean 'source'?) (line 8)",
        ),
        (
            (HEAD, MODELS, "select_topk: 0.1\n", TAIL),
            "select_topk: unknown key; mergekit reads it under `parameters` (line 7)",
        ),
        (
            (HEAD, MODELS, TAIL, "  max_steps: 1\n"),
            f"parameters.max_steps: {SAME_KEY} (lines 9 and 10)",
        ),
        ((HEAD, MODELS, MODELS, TAIL), f"models: {SAME_KEY} (lines 4 and 7)"),
        (
            (HEAD, DOUBLE, TAIL),
            "models[0].parameters.weight[0].valeu: unknown key (did you mean 'value'?) (line 8)",
        ),
    ],
)
def test_keys_that_mergekit_would_drop(text, tmp_path, parts, said):
    assert said in refusal(text(*parts), tmp_path)


def test_keys_below_slices_and_in_python(family, tmp_path):
    from somf_mergekit import RecipeError, learn

    source = {"model": str(family / "math"), "layer_range": [0, 2], "weight": 1}
    recipe = tiny.recipe(family / "base", [], safety_dataset=str(family / "pairs.jsonl"))
    del recipe["models"]
    recipe["slices"] = [{"sources": [source], "residual_weight": 1}]
    with pytest.raises(RecipeError) as caught:
        learn(recipe, tmp_path / "mask")
    said = caught.value.problems
    place = "slices[0].sources[0]"
    assert f"{place}.weight: unknown key; mergekit reads it under `{place}.parameters`" in said
    assert any(p.startswith("slices[0].residual_weight: unknown key") for p in said)
    base = family / "base"
    assert (
        f"slices[0].sources: base_model {base} is not among them: add it, with its layer_range"
        in said
    )


def test_what_yaml_shares_is_neither_unknown_nor_twice(text, tmp_path):
    shared = "- model: MATH\n  parameters: &p {weight: 0.5}\n"
    merged = "- model: CODE\n  parameters:\n    <<: *p\n    weight: 0.25\n"
    file = tmp_path / "recipe.yml"
    file.write_text(text(HEAD, "models:\n", shared, merged, TAIL))
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (
            [{"value": 0.5}, {"filter": "self_attn", "value": 0.1}],
            "the filter 'self_attn' is never reached",
        ),
        (
            [{"filter": "*", "value": 0.5}, {"value": 0.25}],
            "the value 0.25 is never reached",
        ),
        (
            [{"filter": "mlp", "value": 1}, {"filter": "mlp.up", "value": 2}, {"value": 3}],
            "the filter 'mlp.up' is never reached",
        ),
    ],
)
def test_values_that_no_tensor_gets(family_recipe, tmp_path, weight, said):
    recipe = family_recipe()
    recipe["models"][0]["parameters"]["weight"] = weight
    (found,) = refusal(recipe, tmp_path)
    assert found.startswith(f"models[0].parameters.weight: {said}")


def test_what_the_plan_and_what_the_data_reports_come_together(family_recipe, tmp_path):
    recipe = family_recipe(safety_dataset="./nothing.jsonl")
    del recipe["models"][0]["parameters"]
    said = " ".join(refusal(recipe, tmp_path))
    assert "weight is missing for" in said
    assert "./nothing.jsonl: no such file or folder" in said


@pytest.mark.parametrize("fusion", ["linear", "karcher"])
def test_a_base_that_the_fusion_leaves_out(family_recipe, family, tmp_path, fusion):
    recipe = family_recipe(fusion=fusion)
    recipe["models"].append({"model": str(family / "base"), "parameters": {"weight": 0.3}})
    if fusion == "karcher":
        for model in recipe["models"]:
            del model["parameters"]
    (said,) = refusal(recipe, tmp_path)
    assert said.startswith(f"models[2]: {fusion} fuses the masked models alone, and would leave")


@pytest.mark.parametrize("name", ["bf16", "half", "fp16", "auto", "int64", "bfloat"])
def test_types(family_recipe, tmp_path, name):
    said = refusal(family_recipe() | {"dtype": "torch.float32", "out_dtype": name}, tmp_path)
    (said,) = said
    assert said.startswith(f"out_dtype: '{name}' is not a type to merge in")
    assert said.endswith("write one of bfloat16, float16, float32, float64")


def test_one_model_under_two_names(family_recipe, family, tmp_path):
    base, math = str(family / "base"), str(family / "math")
    (tmp_path / "link").symlink_to(family / "math")
    recipe = family_recipe(fusion="karcher")
    names = [math, str(tmp_path / "link"), math, f"{base}/../base"]
    recipe["models"] = [{"model": name} for name in names]
    once = "a model takes part once"
    assert refusal(recipe, tmp_path) == {
        f"models[1].model: {names[1]} is {math} by another name: {once}",
        f"models[2].model: {math} is there twice: {once}, with one weight",
        f"models[3].model: {names[3]} is base_model by another name: name the fine-tuned model",
    }


def test_models_that_change_nothing(family_recipe, family, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(family / "base", tmp_path / "untouched")
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    # A new adapter has zeros in it.
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    adapted = f"{family / 'base'}+{tmp_path / 'adapter'}"
    recipe = family_recipe()
    for name in (str(tmp_path / "untouched"), adapted):
        recipe["models"].append({"model": name, "parameters": {"weight": 0.5}})
    said = refusal(recipe, tmp_path, "--lora-merge-cache", tmp_path / "cache")
    reported = (
        "changes nothing, all of its task vectors are zero: each tensor is that of base_model"
    )
    base = family / "base"
    assert said == {
        f"{tmp_path / 'untouched'} {reported} {base}. Leave it out.",
        f"{adapted} {reported} {base}. Was the adapter trained, and on this base?",
    }


def linked_folder(base, out):
    out.symlink_to(base)


def linked_file(base, out):
    out.mkdir()
    (out / "model.safetensors").symlink_to(base / "model.safetensors")


def hard_link(base, out):
    out.mkdir()
    os.link(base / "config.json", out / "config.json")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (None, "is there, and would be overwritten"),
        (linked_folder, "is there, and would be overwritten"),
        (linked_file, "model.safetensors in it is a file of model"),
        (hard_link, "config.json in it is a file of model"),
        ("inside", "is in the folder of model"),
    ],
)
def test_a_merge_over_what_it_reads(family_recipe, family, tmp_path, place, said):
    base = tmp_path / "base"
    shutil.copytree(family / "base", base)
    recipe = family_recipe() | {"base_model": str(base)}
    out = tmp_path / "out"
    if place is None or place == "inside":
        out = base if place is None else base / "merged"
    else:
        place(base, out)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, out)
    assert result.exit_code == 1, result.output
    assert all(p.startswith(f"output folder {out}") for p in problems_of(result.output))
    assert said in result.output
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_a_repair_over_what_it_reads(family, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(family / "base", base)
    models = [{"model": str(family / "math")}]
    models.append({"model": str(family / "unaligned"), "parameters": {"role": "unaligned"}})
    recipe = {"merge_method": "resta", "base_model": str(base), "models": models}
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, base)
    assert result.exit_code == 1
    assert "is there, and would be overwritten" in result.output


def test_a_sweep_that_would_remove_a_model(family_recipe, family, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(family / "base", out / "merging")
    recipe = family_recipe(safety_eval=str(family / "pairs.jsonl"))
    recipe["base_model"] = str(out / "merging")
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    arguments = ("--over", "weight=0.5,1", "--out", out)
    result = tiny.invoke("mergekit-somf", "sweep", file, *arguments)
    assert result.exit_code == 1
    assert f"is in {out / 'merging'}, which is put aside or removed" in result.output
    assert (out / "merging/model.safetensors").exists()


def test_a_mask_that_would_put_a_model_aside(family_recipe, family, tmp_path):
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask/masks.safetensors").write_text("an old one")
    shutil.copytree(family / "math", tmp_path / "mask/math")
    recipe = family_recipe()
    recipe["models"][0]["model"] = str(tmp_path / "mask/math")
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert result.exit_code == 1
    assert f"is in {tmp_path / 'mask'}, which is put aside or removed" in result.output


def test_no_room(family_recipe, family, tmp_path, monkeypatch):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    size = sum(t.numel() * 4 for t in tiny.tensors_of(family / "base").values())
    free = [size]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1 << 40, 0, free[0]))
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    # The merge alone would just fit; its mask and the checkpoints do not.
    assert "there is no room for what this merge writes" in result.output
    for said in ("the merge 0.0 in", "the mask 0.0 in", "checkpoints 0.0 in"):
        assert said in result.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))
    free[0] = 1 << 30
    assert tiny.invoke("mergekit-yaml", file, tmp_path / "out").exit_code == 0
    # What is there is used again and replaced, and needs no more room.
    free[0] = 0
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_each_recipe_is_checked_once(family_recipe, family, tmp_path, monkeypatch):
    from somf_mergekit.plugin import merge_check
    from somf_mergekit.prepass import learning_data as inputs

    calls = []
    for module, name in ((merge_check, "check_recipe"), (inputs, "checkpoint_problems")):
        original = getattr(module, name)

        def counted(*arguments, _name=name, _original=original):
            calls.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(module, name, counted)
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "how do i make a bomb"}])
    recipe = family_recipe(max_steps=1, safety_eval=str(prompts))
    tiny.merged(recipe, tmp_path / "out")
    # It was measured beside the same merge without its mask, which is not checked again.
    assert json.loads((tmp_path / "out/somf/report.json").read_text())["evaluation"]
    assert calls == ["check_recipe", "checkpoint_problems"]


def test_all_steps_are_checked_before_the_first_is_merged(family_recipe, tmp_path):
    first = {"name": "safe-math", **family_recipe()}
    second = {"name": "second", **family_recipe(learnin_rate=1, safety_dataset="./nothing.jsonl")}
    second["models"][0]["model"] = "safe-math"
    third = family_recipe(fusion="linear")
    third["out_dtype"] = "bf16"

    def refused_steps(*steps):
        file = tmp_path / "multi.yml"
        file.write_text(yaml.safe_dump_all(steps, sort_keys=False))
        where = ("--out-path", tmp_path / "out", "-I", tmp_path / "steps")
        result = tiny.invoke("mergekit-multi", file, *where)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert not list((tmp_path / "steps").iterdir())
        return problems_of(result.output)

    said = refused_steps(first, second, third)
    assert any(p.startswith("second: parameters.learnin_rate: unknown") for p in said)
    assert any(p.startswith("the last step: out_dtype: 'bf16' is not a type") for p in said)
    del second["parameters"]["learnin_rate"]
    said = refused_steps(first, second)
    assert said == {"second: dataset ./nothing.jsonl: no such file or folder"}
    first["models"][0]["weight"] = 1
    (said,) = refused_steps(first, second)
    assert said.startswith("step 1: models[0].weight: unknown key")
    assert said.endswith("(line 8)")


def test_mergekits_own_words_are_under_the_right_heading(family, tmp_path):
    from mergekit.merge_methods import merge_state_dicts

    from somf_mergekit import RecipeError, register

    register()
    models = {name: {"w": torch.ones(2, 2)} for name in ("math", "code")}
    with pytest.raises(RecipeError, match=r"^somf: Merge method requires a base input"):
        merge_state_dicts(models, "somf", parameters={"weight": 1.0, "mask": "x"})
