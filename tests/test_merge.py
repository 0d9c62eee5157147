"""Whole merges through the stock mergekit-yaml, compared with the formula written out here."""

import json
import os
import shutil

import pytest
import tiny
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file

from somf_mergekit import MaskSet, learn, register
from somf_mergekit.mask import noise
from somf_mergekit.mask.format import json_with_digest, tensor_digest

WEIGHTS = {"math": 0.5, "code": 0.5}


def expected_merge(family, masks, kind="soft", rescale="mean", scale=1.0, weights=WEIGHTS):
    """theta_0 + scale * sum of w_i (theta_i - theta_0) * m / mean(m), tensor by tensor."""
    base = tiny.tensors_of(family / "base")
    models = {name: tiny.tensors_of(family / name) for name in weights}
    merged = {}
    for name, start in base.items():
        mask = torch.ones(1)
        if name in masks:
            p = masks.probabilities(name)
            mask = (p > 0.5).float() if kind == "binary" else p
            mask = mask / mask.mean() if rescale == "mean" else mask
        change = sum(weights[m] * (models[m][name] - start) * mask for m in weights)
        merged[name] = start + scale * change
    return merged


def assert_tensors_close(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def merged(recipe, folder, *options):
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, folder, *options)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def learned(family, tmp_path_factory):
    """One merge by the stock command in a process of its own, with the mask it learned."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=8,
        learning_rate=0.1,
        epochs=1,
        batch_size=4,
        max_length=48,
    )
    file = tiny.write_recipe(folder / "recipe.yml", recipe)
    result = tiny.merge(file, folder / "out")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_stock_command_merges_under_the_learned_mask(family, learned):
    folder, result = learned
    assert "Learning mask" in result.stderr
    assert "accuracy=" in result.stderr
    masks = MaskSet.open(folder / "out")
    assert set(masks.names()) == set(tiny.tensors_of(family / "base"))
    assert_tensors_close(tiny.tensors_of(folder / "out"), expected_merge(family, masks))
    mean = torch.cat([masks.probabilities(n).flatten() for n in masks.names()])
    assert 0.03 < mean.std() < 0.5


def test_what_a_merge_leaves_behind(learned, family):
    folder, _ = learned
    files = {str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
        "somf/masks.safetensors",
        "somf/report.json",
        "somf/report.md",
        "somf/somf.json",
        "somf/training.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    # By default an entry covers a row, and of a vector one weight.
    entries = sum(len(t) for t in tiny.tensors_of(family / "base").values())
    assert os.path.getsize(folder / "out/somf/masks.safetensors") < entries + 20_000
    provenance = json.loads((folder / "out/somf/somf.json").read_text())
    assert provenance["steps"] == 6
    assert provenance["entries"] == entries
    assert provenance["dataset"]["pairs"] == 24
    assert set(provenance["models"]) == {str(family / n) for n in ("base", "math", "code")}
    assert yaml.safe_load(provenance["recipe"])["merge_method"] == "somf"
    assert "sorry" not in json.dumps(provenance)
    rows = [json.loads(r) for r in (folder / "out/somf/training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert provenance["training"]["last_steps"]["loss"] == pytest.approx(
        sum(row["loss"] for row in rows) / 6
    )


def test_a_second_run_reuses_the_mask_and_gives_the_same_bytes(learned):
    folder, _ = learned
    before = {p: p.read_bytes() for p in (folder / "out").rglob("*.safetensors")}
    result = tiny.invoke("mergekit-yaml", folder / "recipe.yml", folder / "out")
    assert result.exit_code == 0, result.output
    assert "reusing the mask" in result.output
    assert "Learning mask" not in result.output
    assert before == {p: p.read_bytes() for p in (folder / "out").rglob("*.safetensors")}


def test_learning_again_elsewhere_gives_the_same_bytes(learned, tmp_path):
    folder, _ = learned
    masks = learn(folder / "recipe.yml", tmp_path / "artifact")
    assert (tmp_path / "artifact/masks.safetensors").read_bytes() == (
        folder / "out/somf/masks.safetensors"
    ).read_bytes()
    assert masks.provenance == MaskSet.open(folder / "out").provenance


def test_another_seed_learns_anew_and_keeps_the_old_mask(learned, tmp_path, family_recipe):
    merged(family_recipe(), tmp_path / "out")
    old = (tmp_path / "out/somf/masks.safetensors").read_bytes()
    result = merged(family_recipe(seed=1), tmp_path / "out")
    assert "learned with other" in result.output
    assert (tmp_path / "out/somf.before/masks.safetensors").read_bytes() == old
    assert (tmp_path / "out/somf/masks.safetensors").read_bytes() != old
    # That place is for the mask of this folder alone.
    given = family_recipe(safety_dataset=None, mask=str(tmp_path / "out/somf.before"))
    file = tiny.write_recipe(tmp_path / "given.yml", given)
    refused = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert "which is put aside or replaced by the masks of this merge: move it" in " ".join(
        refused.output.split()
    )
    assert (tmp_path / "out/somf.before/masks.safetensors").read_bytes() == old


def test_another_mask_kind_reuses_the_mask(tmp_path, family, family_recipe):
    merged(family_recipe(), tmp_path / "out")
    result = merged(family_recipe(mask_kind="binary"), tmp_path / "out")
    assert "reusing the mask" in result.output
    masks = MaskSet.open(tmp_path / "out")
    assert_tensors_close(
        tiny.tensors_of(tmp_path / "out"), expected_merge(family, masks, kind="binary")
    )


def test_a_given_mask_is_what_is_used(learned, tmp_path, family, family_recipe):
    source, _ = learned
    stored = load_file(source / "out/somf/masks.safetensors")
    stored["model.norm.weight"] = torch.full_like(stored["model.norm.weight"], 9)
    stored["lm_head.weight"][:, ::2] = 0
    (tmp_path / "edited").mkdir()
    from safetensors import safe_open

    with safe_open(source / "out/somf/masks.safetensors", framework="pt") as handle:
        header = json.loads(handle.metadata()["somf"])
    digests = {name: tensor_digest(codes) for name, codes in stored.items()}
    metadata = {"somf": json.dumps(json_with_digest({**header, "digests": digests}))}
    save_file(stored, tmp_path / "edited/masks.safetensors", metadata=metadata)
    recipe = family_recipe(safety_dataset=None, mask=str(tmp_path / "edited"), mask_rescale="none")
    merged(recipe, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out/somf").iterdir()) == [
        "masks.safetensors",
        "report.json",
        "report.md",
        "somf.json",
    ]
    masks = MaskSet.open(tmp_path / "edited")
    found = tiny.tensors_of(tmp_path / "out")
    assert_tensors_close(found, expected_merge(family, masks, rescale="none"))
    assert masks.probabilities("lm_head.weight")[0, 0] == 0.5 / 256


@pytest.mark.parametrize("kind", ["sampled", "bernoulli"])
def test_drawn_masks_come_from_the_seed(kind, learned, tmp_path, family, family_recipe):
    source, _ = learned
    given = {"safety_dataset": None, "mask": str(source / "out"), "mask_kind": kind}
    outputs = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        merged(family_recipe(**given, seed=seed), tmp_path / name)
        outputs[name] = tiny.tensors_of(tmp_path / name)["lm_head.weight"]
    assert torch.equal(outputs["a"], outputs["b"])
    assert not torch.equal(outputs["a"], outputs["c"])
    p = MaskSet.open(source / "out").probabilities("lm_head.weight")
    key = noise.noise_key(seed=5, step=-1, name="lm_head.weight")
    u = noise.uniform_noise(key, p.numel()).view(p.shape)
    mask = torch.sigmoid((torch.logit(p) + torch.logit(u)) / 0.5)
    if kind == "bernoulli":
        mask = (u > 1 - p).float()
        assert 0.4 < mask.mean() < 0.6
    base, one, two = (
        tiny.tensors_of(family / n)["lm_head.weight"] for n in ("base", "math", "code")
    )
    change = 0.5 * ((one - base) + (two - base))
    torch.testing.assert_close(
        outputs["a"], base + change * mask / mask.mean(), rtol=1e-5, atol=1e-6
    )


def test_an_untrained_soft_mask_is_plain_task_arithmetic(tmp_path, family_recipe):
    recipe = family_recipe(max_steps=0)
    merged(recipe, tmp_path / "somf")
    plain = {**recipe, "merge_method": "task_arithmetic", "parameters": {}}
    merged(plain, tmp_path / "plain")
    assert_tensors_close(tiny.tensors_of(tmp_path / "somf"), tiny.tensors_of(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("own", "scale"),
    [({"normalize": True}, 1.25), ({"lambda": 0.5}, 0.5), ({}, 1.0)],
    ids=["normalize", "lambda", "neither"],
)
def test_the_fusions_own_parameters_keep_their_meaning(tmp_path, family, family_recipe, own, scale):
    recipe = family_recipe(**own)
    for model, weight in zip(recipe["models"], (0.2, 0.6), strict=True):
        model["parameters"]["weight"] = weight
    merged(recipe, tmp_path / "out")
    expected = expected_merge(
        family,
        MaskSet.open(tmp_path / "out"),
        scale=scale,
        weights={"math": 0.2, "code": 0.6},
    )
    assert_tensors_close(tiny.tensors_of(tmp_path / "out"), expected)


def test_tensors_outside_the_patterns_get_no_mask(tmp_path, family, family_recipe):
    merged(
        family_recipe(include=["self_attn", "model.layers.*.mlp.*"], exclude="*.1.mlp*"),
        tmp_path / "out",
    )
    masks = MaskSet.open(tmp_path / "out")
    assert masks.names()
    for name in tiny.tensors_of(family / "base"):
        wanted = "self_attn" in name or ("mlp" in name and ".1." not in name)
        assert (name in masks) == wanted
    assert_tensors_close(tiny.tensors_of(tmp_path / "out"), expected_merge(family, masks))


def test_tensors_that_no_model_changed_get_no_mask(tmp_path, family):
    tokenizer = tiny.tiny_tokenizer()
    base = tiny.tiny_llama(0, len(tokenizer))
    changed = tiny.perturbed(base, 3, names=["q_proj"])
    tiny.save_model(changed, tokenizer, tmp_path / "queries")
    recipe = tiny.recipe(
        family / "base",
        [tmp_path / "queries"],
        weights=[1.0],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        batch_size=4,
        max_length=48,
    )
    merged(recipe, tmp_path / "out")
    assert MaskSet.open(tmp_path / "out").names() == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    ]


def test_sharded_checkpoints_merge_alike(learned, tmp_path, family):
    source, _ = learned
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("base", "math", "code"):
        tiny.save_model(
            AutoModelForCausalLM.from_pretrained(family / name),
            AutoTokenizer.from_pretrained(family / name),
            tmp_path / name,
            max_shard_size="50KB",
        )
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    recipe = yaml.safe_load((source / "recipe.yml").read_text())
    text = yaml.safe_dump(recipe).replace(str(family), str(tmp_path))
    recipe = yaml.safe_load(text)
    recipe["parameters"]["safety_dataset"] = str(family / "pairs.jsonl")
    merged(recipe, tmp_path / "out")
    found, expected = tiny.tensors_of(tmp_path / "out"), tiny.tensors_of(source / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tied_embeddings_share_one_mask(tmp_path, family):
    tokenizer = tiny.tiny_tokenizer()
    base = tiny.tiny_llama(4, len(tokenizer), tied=True)
    tiny.save_model(base, tokenizer, tmp_path / "base")
    tiny.save_model(tiny.perturbed(base, 5), tokenizer, tmp_path / "math")
    recipe = tiny.recipe(
        tmp_path / "base",
        [tmp_path / "math"],
        weights=[0.7],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=3,
        batch_size=4,
        max_length=48,
    )
    merged(recipe, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    assert_tensors_close(
        tiny.tensors_of(tmp_path / "out"),
        expected_merge(tmp_path, masks, weights={"math": 0.7}),
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in masks


@pytest.mark.parametrize("fusion", ["task_arithmetic", "ties"])
def test_pickled_parameters_are_taken_as_tensors(fusion, family, family_recipe, tmp_path):
    """As checkpoints of dict(model.named_parameters()) hold them."""
    found = []
    for name in ("safetensors", "pickled"):
        folder = tmp_path / name
        shutil.copytree(family / "math", folder)
        if name == "pickled":
            (folder / "model.safetensors").unlink()
            weights = {
                k: torch.nn.Parameter(t) for k, t in tiny.tensors_of(family / "math").items()
            }
            torch.save(weights, folder / "pytorch_model.bin")
        recipe = family_recipe(
            fusion=fusion, density=0.5 if fusion == "ties" else None, max_steps=1
        )
        recipe["models"][0]["model"] = str(folder)
        found.append(tiny.merged(recipe, tmp_path / f"{name}-out"))
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_lora_adapters_are_specialists_too(tmp_path, family):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "base")
    torch.manual_seed(0)
    adapter = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(tmp_path / "adapter")
    recipe = tiny.recipe(
        family / "base",
        [f"{family / 'base'}+{tmp_path / 'adapter'}"],
        weights=[1.0],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        batch_size=4,
        max_length=48,
    )
    merged(recipe, tmp_path / "out", "--lora-merge-cache", tmp_path / "cache")
    masks = MaskSet.open(tmp_path / "out")
    assert len(masks.names()) == 2
    whole = adapter.merge_and_unload().state_dict()
    base = tiny.tensors_of(family / "base")
    found = tiny.tensors_of(tmp_path / "out")
    for name in masks.names():
        mask = masks.probabilities(name)
        torch.testing.assert_close(
            found[name],
            base[name] + (whole[name] - base[name]) * mask / mask.mean(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_merged_model_loads_and_answers(learned):
    folder, _ = learned
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from somf_mergekit.data.chat import user_prompt
    from somf_mergekit.evaluate import greedy_answers

    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    prompts = [user_prompt("make a cake"), user_prompt("how do i mix flour with sugar")]
    together = greedy_answers(model, tokenizer, prompts, max_new_tokens=4, batch_size=2)
    alone = [
        greedy_answers(model, tokenizer, [p], max_new_tokens=4, batch_size=1)[0] for p in prompts
    ]
    assert together == alone


def test_bfloat16_merges_round_what_float32_would_give(learned, tmp_path, family, family_recipe):
    source, _ = learned
    recipe = family_recipe(safety_dataset=None, mask=str(source / "out"))
    recipe["dtype"] = "bfloat16"
    merged(recipe, tmp_path / "out")
    masks = MaskSet.open(source / "out")
    base = tiny.tensors_of(family / "base")
    models = [tiny.tensors_of(family / n) for n in ("math", "code")]
    for name, found in tiny.tensors_of(tmp_path / "out").items():
        start = base[name].bfloat16().float()
        mask = masks.probabilities(name)
        change = sum(0.5 * (m[name].bfloat16().float() - start) for m in models)
        expected = start + change * mask / mask.mean()
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() <= expected.abs().max() / 128


def test_merging_in_memory_gives_the_bits_of_the_written_merge(learned, family):
    source, _ = learned
    register()
    models = {name: tiny.tensors_of(family / name) for name in ("base", "math", "code")}
    found = merge_state_dicts(
        models,
        "somf",
        base="base",
        parameters={"mask": str(source / "out"), "weight": {"math": 0.5, "code": 0.5}},
    )
    written = tiny.tensors_of(source / "out")
    assert all(torch.equal(found[name], written[name]) for name in written)


def test_mergekit_multi_runs_a_somf_step(tmp_path, family, family_recipe):
    first = {"name": "safe", **family_recipe(max_steps=2)}
    second = {
        "merge_method": "linear",
        "models": [
            {"model": "safe", "parameters": {"weight": 1.0}},
            {"model": str(family / "base"), "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
    }
    tiny.merged_in_steps([first, second], tmp_path)
    safe, base = tiny.tensors_of(tmp_path / "steps/safe"), tiny.tensors_of(family / "base")
    assert_tensors_close(
        tiny.tensors_of(tmp_path / "out"), {n: (safe[n] + base[n]) / 2 for n in base}
    )
    assert_tensors_close(safe, expected_merge(family, MaskSet.open(tmp_path / "steps/safe")))


def test_a_work_folder_keeps_the_mask_out_of_the_model(tmp_path, family_recipe, monkeypatch):
    monkeypatch.setenv("SOMF_WORK_DIR", str(tmp_path / "work"))
    merged(family_recipe(max_steps=1), tmp_path / "out")
    assert not (tmp_path / "out/somf").exists()
    assert MaskSet.open(tmp_path / "work").names()


def test_options_of_the_machine_are_read_from_the_environment(monkeypatch):
    from mergekit.options import MergeOptions

    from somf_mergekit.common.machine import MachineOptions, autocast_type
    from somf_mergekit.common.merge_options import SomfOptions

    for variable, text in (
        ("SOMF_PRECISION", "float32"),
        ("SOMF_MICRO_BATCH_SIZE", "3"),
        ("SOMF_CHECKPOINT_MINUTES", "0.5"),
        ("SOMF_ENGINE", ""),
        ("SOMF_REPORT", "none"),
        ("SOMF_CACHE_DIR", "somewhere"),
    ):
        monkeypatch.setenv(variable, text)
    expected = MachineOptions(
        micro_batch_size=3,
        precision="float32",
        checkpoint_minutes=0.5,
        report="none",
        cache_dir="somewhere",
    )
    found = SomfOptions.of(MergeOptions(cuda=True))
    assert (found.machine, found.device) == (expected, "cuda")
    assert SomfOptions.of(found) is found
    for text, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        assert autocast_type("cpu", text) is dtype
    assert autocast_type("cpu") in (None, torch.bfloat16)


def test_micro_batches_are_set_from_the_environment(tmp_path, family_recipe, monkeypatch):
    monkeypatch.setenv("SOMF_PRECISION", "float32")
    monkeypatch.setenv("SOMF_MICRO_BATCH_SIZE", "1")
    merged(family_recipe(), tmp_path / "one")
    monkeypatch.delenv("SOMF_MICRO_BATCH_SIZE")
    merged(family_recipe(), tmp_path / "all")
    one, whole = (MaskSet.open(tmp_path / n) for n in ("one", "all"))
    difference = torch.cat(
        [(one.probabilities(n) - whole.probabilities(n)).flatten() for n in one.names()]
    )
    assert (difference.abs() < 1 / 100).float().mean() > 0.99
