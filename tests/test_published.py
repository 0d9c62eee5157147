"""Masks on the hub, one on loopback: fetched by their id, pushed under one."""

import json
import re
import sys
from pathlib import Path

import loopback_hub
import pytest
import tiny
import torch
import yaml

from somf_mergekit import MaskSet, RecipeError, learn
from somf_mergekit.mask.writing import (
    copy_masks,
    write_masks,
    write_packed_masks,
    write_with_record,
)
from somf_mergekit.report.mask_card import used_recipe
from somf_mergekit.report.publishing import PublicNames

UNSAFE = "bin pt pth pkl ckpt py so sh"
# Runs several commands in a process that reads the environment when it starts.
COMMANDS = """
import json, os, sys
from click.testing import CliRunner
from somf_mergekit.cli import main
found = []
for os.environ["HF_TOKEN"], command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    found.append([result.exit_code, result.output])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def learned(family, tmp_path_factory):
    """A mask and the parameters of a merge that uses it."""
    recipe = tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        batch_size=4,
        max_length=48,
        held_out_share=0.3,
    )
    folder = tmp_path_factory.mktemp("learned") / "mask"
    learn(recipe, folder)
    return folder


def commands(hub, *given, tokens=(), cwd=None, **environment):
    """Run commands of ours with the hub; return their exit codes and outputs.

    Each has one of ``tokens``, the owner's where there are none.
    """
    tokens = tokens or [loopback_hub.TOKEN] * len(given)
    texts = [[str(part) for part in command] for command in given]
    result = tiny.run(
        sys.executable,
        "-c",
        COMMANDS,
        json.dumps(list(zip(tokens, texts, strict=True))),
        env=hub.environment | environment,
        cwd=cwd,
    )
    assert result.returncode == 0, result.stderr
    shown = result.stdout + result.stderr
    assert not any(token in shown for token in tokens if token)
    assert "Traceback" not in shown
    return json.loads(result.stdout.splitlines()[-1])


def message(found):
    """The one line that a command ended with."""
    code, output = found
    assert code == 1, output
    line = output.strip().splitlines()[-1]
    assert line.startswith("Error: "), output
    return line


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_a_published_mask_merges_as_its_folder_does(hub, learned, family, family_recipe, tmp_path):
    commit = hub.add("org/mask", learned, ["README.md", "figure.png"])
    pinned = f"org/mask@{commit}"
    tiny.merged(family_recipe(safety_dataset=None, mask=str(learned)), tmp_path / "folder")
    expected = files_of(tmp_path / "folder")

    def merged(name, mask, *options, **environment):
        content = family_recipe(safety_dataset=None, mask=mask)
        file = tiny.write_recipe(tmp_path / f"{name}.yml", content)
        out = tmp_path / name
        result = tiny.merge(file, out, *options, env=hub.environment | environment)
        assert result.returncode == 0, result.stderr
        assert loopback_hub.TOKEN not in result.stdout + result.stderr
        assert files_of(out) == expected
        recorded = json.loads((out / "somf/somf.json").read_text())
        for model in ("math", "code"):
            given = recorded["masks"][str(family / model)]
            assert (given["source"], given["pinned"]) == (mask, pinned)
        assert json.loads((out / "somf/report.json").read_text())["mask"]["pinned"] == pinned
        for text in (out / "README.md", out / "somf/report.md"):
            assert f"published as {pinned}" in text.read_text()
        history = json.loads((out / "somf/report.json").read_text())["learning"]["curve"]
        assert len(history) == 2

    merged("by-commit", pinned)
    merged("by-branch", "org/mask@main", "--transformers-cache", tmp_path / "cache")
    found = tmp_path.rglob("masks.safetensors")
    cached = [file for file in found if file.parent.name == commit]
    assert {file.relative_to(tmp_path).parts[0] for file in cached} == {"home", "cache"}
    paths = {path for _, path, _ in hub.requests}
    assert all("org/mask" in path for path in paths)
    assert not any("figure.png" in path or "gitattributes" in path for path in paths)
    assert {token for _, _, token in hub.requests} == {loopback_hub.TOKEN}
    hub.stop()
    merged("unreachable", pinned)


@pytest.mark.slow
def test_what_is_pushed_merges_and_tells_nothing_of_the_machine(
    hub, learned, family, family_recipe, tmp_path
):
    [(code, output)] = commands(hub, ["push", learned, "org/new", "--private"])
    assert code == 0, output
    repository = hub.repositories["org/new"]
    pinned = f"org/new@{repository.branches['main']}"
    assert output.endswith(f"mask: {pinned}\n")
    assert repository.private
    names = {"masks.safetensors", "somf.json", "training.jsonl", "README.md"}
    assert set(repository.files) == {".gitattributes", *names}
    for name, content in repository.files.items():
        for place in (family, learned, Path.home()):
            assert str(place).encode() not in content, name

    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name in names:
        (pushed / name).write_bytes(repository.files[name])
    masks, original = MaskSet.open(pushed), MaskSet.open(learned)
    assert masks.problems() == []
    assert masks.names() == original.names()
    assert all(torch.equal(masks.entries(n), original.entries(n)) for n in masks.names())
    models = original.provenance["models"]
    assert masks.provenance["base_model"] == "base"
    named = {Path(name).name: digest for name, digest in models.items()}
    assert masks.provenance["models"] == named
    assert masks.provenance["fingerprint"] == original.provenance["fingerprint"]

    card = (pushed / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    tags = ["mergekit", "somf", "safety", "mask"]
    assert yaml.safe_load(front) == {"library_name": "mergekit", "tags": tags}
    assert all(digest in text for digest in models.values())
    data = original.provenance["dataset"]
    assert data["fingerprint"] in text
    counts = f"{data['pairs']} pairs, and {data['held_out']} held out"
    assert f"pairs.jsonl, split train: {counts}" in text
    assert "## What was measured" in text
    assert "under the mask" in text

    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["parameters"] == {"mask": "org/new"}
    recipe["base_model"] = str(family / recipe["base_model"])
    for model in recipe["models"]:
        model["model"] = str(family / model["model"])
    expected = tiny.merged(
        recipe | {"parameters": {"mask": str(learned)}}, tmp_path / "expected", "--quiet"
    )
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.merge(file, tmp_path / "out", env=hub.environment)
    assert result.returncode == 0, result.stderr
    assert loopback_hub.TOKEN not in result.stdout + result.stderr
    written = tiny.tensors_of(tmp_path / "out")
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    recorded = json.loads((tmp_path / "out/somf/somf.json").read_text())["masks"]
    assert {given["pinned"] for given in recorded.values()} == {pinned}


@pytest.mark.slow
def test_a_later_push_takes_the_place_of_what_was_there(hub, learned, family, tmp_path):
    write_packed_masks(tmp_path / "packed", MaskSet.open(learned))
    (tmp_path / "packed/training.jsonl").unlink()
    record = json.loads((tmp_path / "packed/somf.json").read_text())
    assert "training.jsonl" in record["checksums"]
    copy_masks(tmp_path / "used", MaskSet.open(learned), {"mask": str(learned)})
    hub.add("org/base")

    def on_the_hub(record):
        text = json.dumps(record).replace(f"{family}/base", "org/base")
        return json.loads(text.replace(f"{family}/math", "org/base+org/unknown"))

    write_with_record(tmp_path / "named", MaskSet.open(learned), on_the_hub)
    first, damaged, branch, other = commands(
        hub,
        ["push", tmp_path / "named", "org/mask"],
        ["push", tmp_path / "packed", "org/mask"],
        ["push", learned, "org/mask", "--revision", "second"],
        ["push", tmp_path / "used", "org/mask"],
    )
    assert "training.jsonl is missing" in message(damaged)
    repository = hub.repositories["org/mask"]
    card = next(files for files in repository.commits.values() if "README.md" in files)["README.md"]
    assert yaml.safe_load(card.decode().split("---\n")[1])["base_model"] == ["org/base"]
    assert not repository.private
    assert [found[0] for found in (first, branch, other)] == [0, 0, 0], (first, branch, other)
    assert f"org/mask@{repository.branches['second']}" in branch[1]
    assert "training.jsonl" in repository.commits[repository.branches["second"]]
    # The merge's folder has none, and the one that was there is of another artifact.
    assert "training.jsonl" not in repository.files
    # A branch is fetched as it is at the time; without the hub it is what was fetched last.
    [now] = commands(hub, ["pack", "org/mask", tmp_path / "now"])
    files = {"masks.safetensors": b"of another kind"}
    repository.commit(files)
    [offline] = commands(hub, ["pack", "org/mask", tmp_path / "offline"], HF_HUB_OFFLINE="1")
    (tmp_path / "here").mkdir()
    changed, second = commands(
        hub,
        ["pack", "org/mask", tmp_path / "changed"],
        ["inspect", "org/mask@second"],
        cwd=tmp_path / "here",
    )
    assert (now[0], offline[0], second[0]) == (0, 0, 0), (now, offline, second)
    assert "masks.safetensors can't be read" in message(changed)
    assert files_of(tmp_path / "offline") == files_of(tmp_path / "now")
    assert "mlp.up_proj" in second[1]
    # The cache gets no plot.
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["mask.png"]
    assert not list((tmp_path / "home").rglob("*.png"))


@pytest.mark.slow
def test_what_can_not_be_fetched_is_said_in_a_line(hub, learned, tmp_path):
    hub.add("org/mask", learned)
    hub.add("org/private", learned, private=True)
    hub.add("org/gated", learned, gated=True)
    hub.add("org/refused", learned, status=403)
    hub.add("org/broken", learned, status=500)
    hub.add("org/model", files=["config.json", "model.safetensors"])
    unsafe = ["run.SH", "libmask.so.1", "b.exe", *(f"a.{end}" for end in UNSAFE.split())]
    for file in unsafe:
        hub.add(f"org/with-{file}", learned, [file])
    hub.add("org/merge", files=["model.safetensors"])
    merge = {f"somf/{file.name}": file.read_bytes() for file in learned.iterdir()}
    hub.repositories["org/merge"].commit(merge)
    expected = {
        "org/nothing": "there is no such repository, or it is private",
        "org/private": "there is no such repository, or it is private",
        "org/gated": "its owner gives access on request",
        "org/refused": "access is refused (status 403)",
        "org/broken": "the server answered with status 500",
        "org/model": "the repository has no masks.safetensors",
        "org/mask@other": "the repository has no revision other",
        f"org/mask@{'0' * 40}": f"the repository has no revision {'0' * 40}",
        **{f"org/with-{file}": f"can run code ({file})" for file in unsafe},
        # No ids: nothing is asked.
        "org/mask@../x": "no such mask",
        "org/mask@": "no such mask",
        "org--x/mask": "no such mask",
        "mask": "no such mask",
    }
    tries = [["pack", name, tmp_path / "packed"] for name in expected]
    found = commands(hub, *tries, tokens=["hf_of_a_stranger"] * len(tries))
    for (name, reason), one in zip(expected.items(), found, strict=True):
        assert reason in message(one), name
    assert not any("with-" in path and "/resolve/" in path for _, path, _ in hub.requests)
    assert not (tmp_path / "packed").exists()
    [offline, merged] = commands(
        hub, ["pack", "org/mask", tmp_path / "p"], ["pack", "org/merge", tmp_path / "p"]
    )
    assert (offline[0], merged[0]) == (0, 1)
    assert "is not empty" in message(merged)
    [merged] = commands(hub, ["pack", "org/merge", tmp_path / "merged"])
    assert merged[0] == 0, merged[1]
    [known, unknown] = commands(
        hub,
        ["pack", "org/mask@main", tmp_path / "known"],
        ["pack", "org/gated", tmp_path / "unknown"],
        HF_HUB_OFFLINE="1",
    )
    assert known[0] == 0, known[1]
    assert "it isn't in the cache, and HF_HUB_OFFLINE forbids to ask" in message(unknown)
    hub.stop()
    [gone] = commands(hub, ["pack", "org/gated", tmp_path / "unknown"])
    assert "it can't be reached (ConnectError)" in message(gone)


@pytest.mark.slow
def test_what_can_not_be_pushed_is_said_in_a_line(hub, learned, tmp_path):
    hub.add("org/model", files=["config.json", "model.safetensors", "README.md"])
    hub.add("org/pickle", learned, ["pytorch_model.bin"])
    hub.add("org/public", learned)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in learned.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (damaged / file.name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    unknown = write_masks(
        tmp_path / "unknown", {"a": torch.rand(3, 2)}, aliases={}, provenance={}, history=[]
    )
    tries = {
        "both": ["push", tmp_path / "empty", "name"],
        "gone": ["push", tmp_path / "gone", "org/new"],
        "empty": ["push", tmp_path / "empty", "org/new"],
        "damaged": ["push", damaged, "org/new"],
        "silent": ["push", Path(unknown.path).parent, "org/new"],
        "branch": ["push", learned, "org/new", "--revision", "../x"],
        "offline": ["push", learned, "org/new"],
    }
    tokens = [loopback_hub.TOKEN] * (len(tries) - 1) + [""]
    found = commands(hub, *tries.values(), tokens=tokens, HF_HUB_OFFLINE="1")
    said = dict(zip(tries, (output for _, output in found), strict=True))
    assert {code for code, _ in found} == {1}
    assert all("HF_HUB_OFFLINE is set" in output for output in said.values())
    for name, reason in {
        "both": "'name' can't be an id on the hub; expected ORGANISATION/NAME",
        "gone": "gone isn't there",
        "empty": "no such mask",
        "damaged": "is damaged (its checksum differs from the one recorded)",
        "silent": "doesn't record how it was learned (base_model, dataset",
        "branch": "can't be the name of a branch",
        "offline": "there is no login for the hub",
    }.items():
        assert reason in said[name], name
    assert "no such mask" in said["both"]
    assert not hub.requests
    push = ["push", learned, "org/new"]
    nobody, reader, stranger, model, pickle, public = commands(
        hub,
        push,
        push,
        push,
        ["push", learned, "org/model"],
        ["push", learned, "org/pickle"],
        ["push", learned, "org/public", "--private"],
        tokens=["", loopback_hub.READ_ONLY_TOKEN, "hf_of_a_stranger", *[loopback_hub.TOKEN] * 3],
    )
    assert "there is no login for the hub" in message(nobody)
    assert "access is refused (status 403)" in message(reader)
    assert "log in with a token that has access" in message(stranger)
    assert "holds other things than a mask (README.md, config.json" in message(model)
    assert "can run code (pytorch_model.bin)" in message(pickle)
    assert "--private is of new repositories, and this one is public" in message(public)
    assert "org/new" not in hub.repositories
    assert all(len(one.commits) == 1 for one in hub.repositories.values())


def test_a_path_that_is_there_is_no_id(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org/mask").symlink_to(learned)
    (tmp_path / "org/empty").mkdir()
    assert MaskSet.open("org/mask").names() == MaskSet.open(learned).names()
    with pytest.raises(RecipeError, match="mask org/empty: no such mask"):
        MaskSet.open("org/empty")
    with pytest.raises(RecipeError, match=r"is no file or folder here; on the hub: it isn't in"):
        MaskSet.open("org/other")


def test_paths_become_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    snapshot = f"/x/hub/models--org--base/snapshots/{'0' * 40}"
    cases = {
        "/home/someone/my models/base/": "base",
        "/home/else/base": "base-2",
        "~/specialist": "specialist",
        "../adapter": "adapter",
        "C:\\Users\\someone\\code": "code",
        "models/base": "base-3",
        "runs/a/tuned": "tuned",
        snapshot: "org/base",
        "org/base": "org/base",
        "org/base@main+/home/someone/lora": "org/base@main+lora",
        "math=/home/someone/m.jsonl,code=org/code": "math=m.jsonl,code=org/code",
        "/home/someone/set.jsonl,split=test": "set.jsonl,split=test",
        "*.mlp.up_proj": "*.mlp.up_proj",
        "{% if a %}/home{% endif %}": "{% if a %}/home{% endif %}",
        "0.3 of 24 pairs": "0.3 of 24 pairs",
    }
    names = PublicNames()
    assert {path: names.in_record(path) for path in cases} == cases
    record = {
        "recipe": "base_model: /home/someone/my models/base/\nn: [1, ~/specialist]\n",
        "models": {"/home/else/base": "digest", "n": 3},
    }
    assert names.in_record({"origin": record}) == {
        "origin": {
            "recipe": "base_model: base\nn:\n- 1\n- specialist\n",
            "models": {"base-2": "digest", "n": 3},
        }
    }


def test_a_recipe_that_learned_becomes_one_that_uses_the_mask():
    recipe = """
    merge_method: somf
    base_model: org/base
    models: [{model: org/math, parameters: {weight: 0.5}}]
    parameters: {safety_dataset: a, fusion: ties, density: 0.5, max_steps: 3, granularity: row,
      learning_rate: 0.1, mask_kind: binary, exclude: lm_head, seed: 3, skill_eval: a=b}
    dtype: bfloat16
    """
    content = yaml.safe_load(recipe)
    learned_only = {"safety_dataset", "max_steps", "granularity", "learning_rate", "skill_eval"}
    used = {k: v for k, v in content["parameters"].items() if k not in learned_only}
    assert len(used) == 5
    item = {"model": "org/math", "parameters": {"weight": 0.5, "mask": "org/mask"}}
    expected = content | {"models": [item], "parameters": used}
    assert yaml.safe_load(used_recipe(recipe, "org/mask")) == expected
    # That of several models stands for all.
    several = content | {"models": [*content["models"], {"model": "org/code"}]}
    found = yaml.safe_load(used_recipe(yaml.safe_dump(several), "org/mask"))
    assert found == several | {"parameters": {"mask": "org/mask", **used}}
