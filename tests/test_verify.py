"""`mergekit-somf verify` says what of a merge's output is as it should be, and what is not."""

import json
import os
import shutil

import pytest
import tiny
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from safetensors.torch import save_file

from somf_mergekit.plugin.verify import difference


def verified(folder, *options, code=0):
    result = tiny.invoke("mergekit-somf", "verify", folder, *options)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    *lines, summary = result.stdout.splitlines()
    reported = {}
    for line in lines:
        subject, verdict, what = line.split(": ", 2)
        reported[subject] = (verdict, what)
    wrong = [subject for subject, (verdict, _) in reported.items() if verdict == "WRONG"]
    assert f"{len(wrong)} wrong" in summary
    return reported


@pytest.fixture(scope="module")
def merge(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    content = tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=1,
        batch_size=4,
        max_length=48,
    )
    tiny.merged(content, folder / "out")
    return folder / "out"


@pytest.fixture
def out(merge, tmp_path):
    shutil.copytree(merge, tmp_path / "out")
    return tmp_path / "out"


def changed(out, name, change):
    tensors = tiny.tensors_of(out)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_merge_that_is_right(out, family):
    reported = verified(out, "--all", "--strict")
    assert [verdict for verdict, _ in reported.values()] == ["right"] * 4
    count = len(tiny.tensors_of(out))
    assert reported["tensors"][1] == f"{count} of {count} are what base, models and mask give"
    assert "the mask was learned with these" in reported["models"][1]
    for name in ("base", "math", "code"):
        assert str(family / name) in reported["models"][1]
    few = verified(out, "--sample", "3")
    assert f"3 of {count} are what" in few["tensors"][1]
    assert f"{count - 3} not looked at" in few["tensors"][1]


def test_the_smallest_change_of_a_tensor_is_reported(out):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][3, 4] += 0.25

    changed(out, name, change)
    verdict, reported = verified(out, "--all", code=1)[name]
    assert verdict == "WRONG"
    assert reported == "differs by up to 0.25 in 1 of 2048 entries in model.safetensors"


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight", "is missing in what is written"),
        (lambda t: t.update(x=torch.ones(1)), "x", "isn't a tensor of this merge"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}),
            "lm_head.weight",
            "is float16",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5]}),
            "model.norm.weight",
            "is float32 (5,), expected float32 (32,)",
        ),
        (
            lambda t: t["model.norm.weight"].fill_(float("nan")),
            "model.norm.weight",
            "differs by up to nan",
        ),
    ],
)
def test_tensors_that_are_others(out, change, name, said):
    changed(out, name, change)
    verdict, reported = verified(out, "--all", code=1)[name]
    assert verdict == "WRONG"
    assert said in reported


def test_weights_that_can_not_be_read(out):
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    verdict, reported = verified(out, code=1)["tensors"]
    assert verdict == "WRONG"
    assert "the written weights can't be read" in reported


@pytest.mark.parametrize(
    ("file", "place"),
    # Of the record of learning: the number of its first step, and the end of its last row.
    [("masks.safetensors", -9), ("somf.json", -9), ("training.jsonl", 9), ("training.jsonl", -2)],
)
def test_a_damaged_artifact(out, file, place):
    data = bytearray((out / "somf" / file).read_bytes())
    data[place] ^= 2
    (out / "somf" / file).write_bytes(data)
    verdict, reported = verified(out, "--sample", "1", code=1)["artifact"]
    assert verdict == "WRONG"
    assert file in reported
    assert "damaged" in reported or "its checksum differs" in reported


@pytest.fixture(scope="module")
def in_shards(merge, tmp_path_factory):
    """The same merge in several files."""
    folder = tmp_path_factory.mktemp("shards")
    content = yaml.safe_load((merge / "mergekit_config.yml").read_text())
    tiny.merged(content, folder / "out", "--out-shard-size", "20K")
    assert "right" in verified(folder / "out", "--strict")["tensors"]
    return folder / "out"


ONE, TWO = (f"model-0000{number}-of-00007.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"


def swapped(out):
    (out / ONE).rename(out / "kept")
    (out / TWO).rename(out / ONE)
    (out / "kept").rename(out / TWO)


def renamed(out):
    (out / ONE).rename(out / "other.safetensors")


def without_index(out):
    (out / INDEX).unlink()


def led_outside(out):
    content = json.loads((out / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = "../out/" + content["weight_map"]["lm_head.weight"]
    (out / INDEX).write_text(json.dumps(content))


def with_a_whole_file_beside(out):
    # transformers takes this one where there are both.
    save_file(tiny.tensors_of(out), out / "model.safetensors", metadata={"format": "pt"})


def without_provenance(out):
    (out / "somf/somf.json").rename(out / "somf/other.json")


def without_history(out):
    (out / "somf/training.jsonl").unlink()


def without_mask(out):
    (out / "somf/masks.safetensors").rename(out / "somf/other.safetensors")


@pytest.mark.parametrize(
    ("change", "subject", "said"),
    [
        (swapped, "lm_head.weight", f"{ONE} can't be read"),
        (renamed, "lm_head.weight", f"{ONE} can't be read"),
        (renamed, "other.safetensors", "is beside the written weights, and isn't one"),
        (without_index, "tensors", "neither model.safetensors nor its index is in"),
        (led_outside, "tensors", f"the index of the weights names '../out/{ONE}'"),
        (with_a_whole_file_beside, "model.safetensors", "and isn't one of them"),
        (without_provenance, "artifact", "somf.json is missing"),
        (without_history, "artifact", "training.jsonl is missing"),
        (without_mask, "artifact", "no such mask"),
    ],
)
def test_files_that_are_not_in_their_place(in_shards, tmp_path, change, subject, said):
    shutil.copytree(in_shards, tmp_path / "out")
    change(tmp_path / "out")
    verdict, reported = verified(tmp_path / "out", "--sample", "2", code=1)[subject]
    assert verdict == "WRONG"
    assert said in reported


def test_another_mask_is_noticed_by_what_was_written(out, family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "other.yml", family_recipe(seed=5))
    assert tiny.invoke("mergekit-somf", "learn", file, tmp_path / "other").exit_code == 0
    shutil.rmtree(out / "somf")
    shutil.copytree(tmp_path / "other", out / "somf")
    reported = verified(out, code=1)
    assert reported["artifact"][0] == reported["models"][0] == "right"
    assert "tensors" not in reported
    assert sum(verdict == "WRONG" for verdict, _ in reported.values()) == 8


def recipe_of(out, change):
    file = out / "mergekit_config.yml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


def test_models_that_have_changed_since(out, family, tmp_path):
    shutil.copytree(family / "code", tmp_path / "code")
    tensors = tiny.tensors_of(tmp_path / "code")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, tmp_path / "code/model.safetensors", metadata={"format": "pt"})
    recipe_of(out, lambda content: content["models"][1].update(model=str(tmp_path / "code")))
    reported = verified(out, "--all", code=1)
    assert reported["models"] == (
        "WRONG",
        f"the mask was learned with other models than {tmp_path / 'code'}",
    )
    assert reported["model.norm.weight"][0] == "WRONG"
    assert "lm_head.weight" not in reported


def test_models_that_are_not_at_hand_are_not_checked(out):
    recipe_of(out, lambda content: content["models"][1].update(model="/nowhere/code"))
    reported = verified(out)
    assert reported["artifact"][0] == "right"
    assert reported["models"][0] == reported["tensors"][0] == "not checked"
    assert "/nowhere/code is not at hand" in reported["models"][1]
    assert "/nowhere/code: there is no such folder" in reported["tensors"][1]
    verified(out, "--strict", code=1)


def test_without_a_recipe_only_the_artifact_is_checked(out):
    (out / "mergekit_config.yml").unlink()
    reported = verified(out)
    assert reported["recipe"][0] == "not checked"
    assert reported["artifact"][0] == "right"
    assert set(reported) == {"recipe", "artifact"}
    (out / "mergekit_config.yml").write_text("a: [")
    assert verified(out, code=1)["recipe"][0] == "WRONG"


def test_pickles_are_not_opened(out, tmp_path):
    (out / "model.safetensors").unlink()
    (out / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    assert "pickled (.bin), which is never opened" in verified(out)["tensors"][1]
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "empty.safetensors").write_bytes(b"")
    assert "names 'pytorch_model.bin'" in verified(out)["tensors"][1]


@pytest.mark.parametrize(
    "case", ["ties in bfloat16", "sampled to bfloat16", "dare with union", "slices"]
)
def test_every_kind_of_merge_can_be_checked(merge, family, family_recipe, tmp_path, case):
    content = family_recipe(safety_dataset=None, mask=str(merge))
    if case == "ties in bfloat16":
        content["parameters"] |= {"fusion": "ties", "density": 0.4}
        content["dtype"] = "bfloat16"
    elif case == "sampled to bfloat16":
        content["parameters"] |= {"mask_kind": "sampled", "seed": 3}
        content["out_dtype"] = "bfloat16"
    elif case == "dare with union":
        content["parameters"] |= {"fusion": "dare_linear", "density": 0.5}
        content["tokenizer"] = {"source": "union"}
    else:
        models = ("base", "math", "code")
        sources = [{"model": str(family / n), "layer_range": [0, 1]} for n in models]
        for source in sources[1:]:
            source["parameters"] = {"weight": 0.5}
        again = [{**source, "layer_range": [1, 2]} for source in sources]
        content["slices"] = [{"sources": sources}, {"sources": again}, {"sources": sources}]
        del content["models"]
    tiny.merged(content, tmp_path / "out")
    reported = verified(tmp_path / "out", "--all", "--strict")
    assert {verdict for verdict, _ in reported.values()} == {"right"}
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors):
        tensors[name] += 0.125

    changed(tmp_path / "out", name, change)
    assert verified(tmp_path / "out", "--all", code=1)[name][0] == "WRONG"


def test_a_given_mask_of_other_models_is_no_fault(merge, family, family_recipe, tmp_path):
    content = family_recipe(safety_dataset=None, mask=str(merge), mask_transfer=True)
    content["models"][0]["model"] = str(family / "safety-tuned")
    tiny.merged(content, tmp_path / "out")
    reported = verified(tmp_path / "out")
    assert reported["models"][0] == "not checked"
    assert "safety-tuned, and is given by the recipe" in reported["models"][1]
    assert reported["tensors"][0] == "right"


def test_adapters_need_the_folder_that_the_merge_stored_them_in(family, tmp_path, family_recipe):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    content = family_recipe(max_steps=1)
    content["models"] = content["models"][:1]
    content["models"][0]["model"] = f"{family / 'base'}+{tmp_path / 'adapter'}"
    cache = ("--lora-merge-cache", str(tmp_path / "cache"))
    tiny.merged(content, tmp_path / "out", *cache)
    assert {v for v, _ in verified(tmp_path / "out", *cache, "--all").values()} == {"right"}
    adapter = next((tmp_path / "adapter").glob("adapter_model.*"))
    later = adapter.stat().st_mtime + 3600
    os.utime(adapter, (later, later))
    changed = tiny.refused(content, tmp_path, *cache)
    assert "was changed after mergekit put them together" in changed
    assert str(tmp_path / "cache") in changed
    (stored,) = (tmp_path / "cache").iterdir()
    (stored / "model.safetensors").unlink()
    # As in a process of its own: mergekit remembers where it has put models.
    LoaderCache().loaders.clear()
    assert "was left unfinished, remove it" in tiny.refused(content, tmp_path, *cache)
    reported = verified(tmp_path / "out")
    assert reported["models"][0] == reported["tensors"][0] == "not checked"
    assert "--lora-merge-cache" in reported["tensors"][1]


def test_repairs_have_no_mask_and_are_checked_alike(family, tmp_path):
    content = tiny.recipe(family / "base", [family / "math", family / "unaligned"])
    content["merge_method"] = "resta"
    content["models"] = [
        {"model": str(family / "math")},
        {"model": str(family / "unaligned"), "parameters": {"role": "unaligned"}},
    ]
    content["parameters"] = {"gamma": 0.5}
    tiny.merged(content, tmp_path / "out")
    assert {v: t for t, (v, _) in verified(tmp_path / "out").items()} == {"right": "tensors"}


def test_rounding_is_no_difference():
    expected = torch.linspace(-2, 2, 1001)
    reported, is_right = difference(expected, expected * (1 + 1e-7))
    assert is_right
    assert "entries" in reported
    assert difference(expected, expected.clone()) == ("", True)
    assert not difference(expected, expected + 1e-4)[1]
    half = expected.bfloat16()
    assert difference(half, half.nextafter(torch.tensor(9.0).bfloat16()))[1]
    assert not difference(torch.tensor([1, 2]), torch.tensor([1, 3]))[1]
