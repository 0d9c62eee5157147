"""Adapters of every kind are merged as PEFT does it, onto the base that they were trained on."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from huggingface_hub import constants
from peft import PeftModel

from somf_mergekit import MaskSet

EXPERTS = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "experts": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
# What Unsloth writes beside PEFT's own keys, and PEFT of a later release.
UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "key_of_a_later_release": None,
}


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, family):
    """A base that is a mixture of experts."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**EXPERTS, vocab_size=len(tokenizer))
    tiny.save_model(transformers.Qwen3MoeForCausalLM(config), tokenizer, folder / "base")
    return folder


def adapter(base, folder, seed=1, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    if "target_parameters" in options:
        options["target_modules"] = ["q_proj"]
    return tiny.save_adapter(base, folder, seed, **options)


def configured(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def merged_by_peft(base, adapter, folder):
    """The tensors of a base with its adapter merged in, as PEFT alone does it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return tiny.tensors_of(folder)


def recipe(base, model, family, **parameters):
    """Of one specialist, added by a half."""
    values = {"max_steps": 1, "learning_rate": 0.1, "batch_size": 4, "max_length": 48}
    data = str(family / "pairs.jsonl")
    return tiny.recipe(base, [model], safety_dataset=data, **values, **parameters)


def assert_merged(written, start, tuned, out):
    """A merge is start + a half of the change, each entry by its mask over the mask's mean."""
    masks = MaskSet.open(out)
    assert written.keys() == start.keys()
    assert masks.names()
    for name in start:
        change = 0.5 * (tuned[name] - start[name])
        if name in masks.names():
            mask = masks.probabilities(name)
            change = change * mask / mask.mean()
        torch.testing.assert_close(written[name], start[name] + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_as_peft_does(kind, family, mixture, tmp_path):
    base = (mixture if kind == "experts" else family) / "base"
    place = adapter(base, tmp_path / "adapter", **KINDS[kind])
    content = recipe(base, f"{base}+{place}", family)
    out, cache = tmp_path / "out", tmp_path / "cache"
    written = tiny.merged(content, out, "--lora-merge-cache", cache)
    start, tuned = tiny.tensors_of(base), merged_by_peft(base, place, tmp_path / "peft")
    assert_merged(written, start, tuned, out)
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert set(MaskSet.open(out).names()) == changed
    assert len(changed) == {"experts": 2 + 2 * 4 * 3, "modules_to_save": 6}.get(kind, 4)


def test_an_adapter_of_unsloth_on_the_base_that_it_quantized(family, tmp_path):
    """It names a 4-bit copy of the base, and has keys that this PEFT does not know."""
    base = tmp_path / "Meta-Llama-Tiny"
    shutil.copytree(family / "base", base)
    place = adapter(base, tmp_path / "adapter")
    configured(place, base_model_name_or_path="unsloth/llama-tiny-unsloth-bnb-4bit", **UNSLOTH)
    out = tmp_path / "out"
    written = tiny.merged(
        recipe(base, f"{base}+{place}", family), out, "--lora-merge-cache", tmp_path / "cache"
    )
    tuned = merged_by_peft(base, place, tmp_path / "peft")
    assert_merged(written, tiny.tensors_of(base), tuned, out)


def snapshot(source, cache, name, revision="0123abcd"):
    """Lay a folder out as the hub's cache does: links to files named by their contents."""
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    blobs = folder.parents[1] / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (folder / file.name).symlink_to(f"../../blobs/{number:040x}")
    return folder


def test_snapshots_of_the_hub_and_a_base_with_an_adapter(family, tmp_path):
    """The base is `base+adapter` itself; all paths have blanks and letters beyond ASCII."""
    cache = tmp_path / "Меine Modelle é" / "hub"
    plain = snapshot(family / "base", cache, "some-org/Base-Model")
    math = snapshot(family / "math", cache, "other/math")
    places = {}
    for seed, name in enumerate(("aligned", "code"), 1):
        own = adapter(family / "base", tmp_path / name, seed)
        # As it is saved where the base was loaded by its id.
        configured(own, base_model_name_or_path="some-org/Base-Model")
        places[name] = snapshot(own, cache, f"me/{name}")
    base = f"{plain}+{places['aligned']}"
    content = recipe(base, math, family)
    content["models"].append({"model": f"{plain}+{places['code']}", "parameters": {"weight": 0.25}})
    out = tmp_path / "aus gäbe"
    written = tiny.merged(content, out, "--lora-merge-cache", tmp_path / "käche x")
    start = merged_by_peft(plain, places["aligned"], tmp_path / "start")
    code = merged_by_peft(plain, places["code"], tmp_path / "both")
    both = {
        name: tensor + 0.5 * (code[name] - start[name])
        for name, tensor in tiny.tensors_of(math).items()
    }
    assert_merged(written, start, both, out)
    checked = tiny.invoke("mergekit-somf", "verify", out)
    assert checked.exit_code == 0, checked.output


@pytest.fixture(scope="session")
def bases(family, tmp_path_factory):
    """An adapter of the family's base, and other models, in folders and in a hub's cache."""
    folder = tmp_path_factory.mktemp("bases")
    adapter(family / "base", folder / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    tiny.save_model(model, tiny.tiny_tokenizer(), folder / "copy", max_shard_size="20KB")
    tiny.save_model(tiny.tiny_llama(0, 8, hidden=64), tiny.tiny_tokenizer(), folder / "wide")
    shutil.copytree(family / "base", folder / "mine")
    (folder / "looked-at").mkdir()
    shutil.copy(family / "base/config.json", folder / "looked-at")
    models = {name: family / name for name in ("base", "math")}
    for name, source in {**models, "looked-at": folder / "looked-at"}.items():
        place = snapshot(source, folder / "hub", f"some/{name}")
        (place.parents[1] / "refs").mkdir()
        (place.parents[1] / "refs/main").write_text(place.name)
    return folder


def test_an_id_in_the_hubs_cache_without_a_network(family, bases, tmp_path, monkeypatch):
    """mergekit asks the hub for it all the same: where it is can be given instead."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(bases / "hub"))
    said = tiny.refused(recipe("some/base", "some/math", family), tmp_path)
    for name in ("base", "math"):
        folder = bases / f"hub/models--some--{name}/snapshots/0123abcd"
        assert f"it is in the hub's cache: give that folder, {folder}" in said


SNAPSHOT = "{bases}/hub/models--some--base/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("trained_on", "put_on", "is_other"),
    [
        # By what both folders hold, in whichever type and files.
        ("{family}/math", "{family}/base", True),
        ("{bases}/wide", "{family}/base", True),
        ("{bases}/copy", "{family}/base", False),
        # Also where an id is in the hub's cache.
        ("some/math", "{family}/base", True),
        ("some/base", "{bases}/mine", False),
        # By the ids of both on the hub, whichever folder and system that was.
        ("some/other", SNAPSHOT, True),
        ("some/looked-at", SNAPSHOT, True),
        (r"C:\hub\models--some--other\snapshots\1", SNAPSHOT, True),
        ("some/base", SNAPSHOT, False),
        ("unsloth/Base-bnb-4bit", SNAPSHOT, False),
        ("a-mirror/base", SNAPSHOT, False),
        # What can't be known.
        ("unsloth/base-instruct-bnb-4bit", "{family}/base", None),
        ("/gone/other", "{family}/base", None),
        (None, "{family}/base", False),
    ],
)
def test_an_adapter_of_another_base(
    family, bases, tmp_path, monkeypatch, caplog, trained_on, put_on, is_other
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(bases / "hub"))
    places = {"family": family, "bases": bases}
    base = put_on.format(**places)
    named = trained_on and trained_on.format(**places)
    place = tmp_path / "adapter"
    shutil.copytree(bases / "adapter", place)
    configured(place, base_model_name_or_path=named)
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe(base, f"{base}+{place}", family))
    options = ("--lora-merge-cache", tmp_path / "cache")
    said = f"the adapter {place} was trained on {named}, and is put on {base}"
    result = tiny.invoke("mergekit-somf", "check", file, *options)
    output = " ".join(result.output.split())
    assert result.exit_code == (1 if is_other else 0), output
    assert (f"{said}, another model" in output) == bool(is_other)
    assert (said in caplog.text) == (is_other is None)
    if is_other:
        assert not (tmp_path / "cache").exists()
        assert "merge with --allow-crimes if that is meant" in output
        # Once merged, it is in a cache, and still another base's.
        merged = tiny.invoke("mergekit-somf", "check", file, *options, "--allow-crimes")
        assert merged.exit_code == 0, merged.output
        assert said in caplog.text
        assert tiny.invoke("mergekit-somf", "check", file, *options).exit_code == 1
