"""What decides a mask is compared before it is used again, and what differs is named."""

import json
import os
import shutil
import stat

import pytest
import tiny
import torch
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from somf_mergekit import MaskSet
from somf_mergekit.common import digests
from somf_mergekit.common.requirements import versions
from somf_mergekit.plugin.merge_check import checked_merge
from somf_mergekit.prepass import provenance
from somf_mergekit.recipe.validate import read_recipe


def copied(family, folder):
    for name in ("base", "math", "code", "pairs.jsonl"):
        copy = shutil.copytree if (family / name).is_dir() else shutil.copy
        copy(family / name, folder / name)
    return folder


@pytest.fixture
def own_family(family, tmp_path):
    """A family that a test may change."""
    return copied(family, tmp_path)


@pytest.fixture(scope="module")
def learned_family(family, tmp_path_factory):
    """A family with a mask that was learned of it."""
    folder = copied(family, tmp_path_factory.mktemp("learned"))
    learned(folder)
    return folder


def recipe(folder, **parameters):
    values = {
        "safety_dataset": str(folder / "pairs.jsonl"),
        "max_steps": 1,
        "batch_size": 4,
        "max_length": 48,
    }
    return tiny.recipe(folder / "base", [folder / "math", folder / "code"], **values | parameters)


def learned(folder, content=None, *options):
    file = tiny.write_recipe(folder / "recipe.yml", content or recipe(folder))
    result = tiny.invoke("mergekit-somf", "learn", file, folder / "mask", *options)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def json_change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_weight(folder, content):
    tensors = tiny.tensors_of(folder / "code")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "code/model.safetensors", metadata={"format": "pt"})


def configuration(folder, content):
    json_change(folder / "base/config.json", rms_norm_eps=1e-3)


def chat_template(folder, content):
    file = folder / "base/chat_template.jinja"
    file.write_text(file.read_text().replace("m['content']", "m['content'] + ' !'"))


def tokenizer(folder, content):
    json_change(folder / "base/tokenizer_config.json", pad_token="<s>")


def data(folder, content):
    rows = tiny.preference_rows()
    rows[3]["chosen"] = "sorry no cake"
    tiny.write_jsonl(folder / "pairs.jsonl", rows)


def order_of_data(folder, content):
    tiny.write_jsonl(folder / "pairs.jsonl", tiny.preference_rows()[::-1])


def setting(folder, content):
    content["parameters"]["beta"] = 0.2


def weight(folder, content):
    content["models"][0]["parameters"]["weight"] = 0.4


def dtype(folder, content):
    content["dtype"] = "bfloat16"


def utility(folder, content):
    rows = [{"prompt": "make a cake", "answer": "mix flour"}]
    tiny.write_jsonl(folder / "utility.jsonl", rows)
    content["parameters"]["utility_dataset"] = str(folder / "utility.jsonl")


def tokens(folder, content):
    content["tokenizer"] = {"source": "base", "pad_to_multiple_of": 16}


def order_of_models(folder, content):
    content["models"].reverse()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_weight, "models ({folder}/code)"),
        (configuration, "model configuration"),
        (chat_template, "chat template"),
        (tokenizer, "tokenizer"),
        (data, "data"),
        (order_of_data, "data"),
        (setting, "settings (beta)"),
        (weight, "parameters of the tensors"),
        (dtype, "dtype"),
        (utility, "utility data"),
        (tokens, "tokenizer"),
        (order_of_models, "models ("),
    ],
)
def test_what_changes_a_mask_is_named(learned_family, tmp_path, change, named):
    own = shutil.copytree(learned_family, tmp_path / "own")
    content = recipe(own)
    change(own, content)
    planned, inputs, _ = checked_merge(read_recipe(content), MergeOptions())
    found = provenance.differences(
        MaskSet.open(own / "mask").provenance,
        provenance.learning_fingerprint(planned, inputs.data, inputs.given),
        [str(model) for model in planned.models],
    )
    assert named.format(folder=own) in ", ".join(found)


def test_a_mask_of_another_recipe_is_put_aside(own_family):
    learned(own_family)
    old = (own_family / "mask/masks.safetensors").read_bytes()
    content = recipe(own_family, beta=0.2)
    assert "was learned with other settings (beta): a new one" in learned(own_family, content)
    assert (own_family / "mask.before/masks.safetensors").read_bytes() == old
    assert "reusing the mask" in learned(own_family, content)
    # One is stored, however often the recipe changes.
    content["parameters"]["beta"] += 1
    learned(own_family, content)
    assert (own_family / "mask.before/masks.safetensors").read_bytes() != old
    assert not (own_family / "mask.before-2").exists()


def test_versions_that_differ_are_named(own_family, monkeypatch):
    learned(own_family)
    with monkeypatch.context() as other:
        other.setattr(provenance, "versions", lambda: dict.fromkeys(versions(), "0"))
        reported = learned(own_family)
    assert "versions (mergekit, somf-mergekit, torch, transformers): a new one" in reported


def test_code_of_the_base_decides_a_mask_where_it_may_be_run(own_family):
    learned(own_family)
    (own_family / "base/own.py").write_text("# one")
    assert "reusing the mask" in learned(own_family)
    changed = "was learned with other model configuration: a new one"
    for text in ("# one", "# two"):
        (own_family / "base/own.py").write_text(text)
        assert changed in learned(own_family, None, "--trust-remote-code")
    assert "reusing the mask" in learned(own_family, None, "--trust-remote-code")


def test_what_does_not_change_a_mask_leaves_it(own_family):
    learned(own_family)
    for name in ("base", "math", "code"):
        (own_family / name).rename(own_family / f"moved-{name}")
    content = json.loads(json.dumps(recipe(own_family)).replace(f"{own_family}/", "{}/moved-"))
    content = json.loads(json.dumps(content).replace("{}", str(own_family)))
    content["parameters"]["safety_dataset"] = str(own_family / "pairs.jsonl")
    content["parameters"]["mask_kind"] = "binary"
    assert "reusing the mask" in learned(own_family, content)


def test_provenance_of_a_stranger_is_no_reason_to_stop(own_family):
    for reported in ({}, {"fingerprint": 3}, {"fingerprint": {"models": "x", "settings": []}}):
        assert "models" in provenance.differences(
            reported, {"models": ["1"], "settings": {}}, ["m"]
        )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path):
    """A file that was not written just now."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    return file


@pytest.fixture
def hashed(monkeypatch):
    """The files that were hashed, all of them old enough to be remembered."""
    calls, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: calls.append(path) or real(path))
    monkeypatch.setattr(digests, "_TOO_NEW", -1.0)
    return calls


def test_files_are_hashed_once(cache, weights, hashed):
    first = digests.file_digests([str(weights)])
    assert digests.file_digests([str(weights)]) == first
    assert len(hashed) == 1
    times = weights.stat()
    weights.write_bytes(b"two")
    # As a copy that keeps the time of change does.
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_mtime_ns == times.st_mtime_ns
    assert digests.file_digests([str(weights)]) != first
    assert len(hashed) == 2
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (stored,) = cache.iterdir()
    assert stat.S_IMODE(stored.stat().st_mode) & 0o022 == 0


def test_files_that_were_just_written_are_hashed_again(cache, weights, hashed, monkeypatch):
    monkeypatch.setattr(digests, "_TOO_NEW", 3600.0)
    for _ in range(2):
        digests.file_digests([str(weights)])
    assert len(hashed) == 2
    assert not cache.exists()


def planted(cache):
    """Replace what is remembered with a lie."""
    (file,) = cache.iterdir()
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), "0" * 64)))
    return file


def anyones_file(cache):
    planted(cache).chmod(0o666)


def anyones_folder(cache):
    planted(cache)
    cache.chmod(0o777)


def link_to_a_file(cache):
    file = planted(cache)
    file.rename(cache.parent / "elsewhere")
    file.symlink_to(cache.parent / "elsewhere")


def link_to_a_folder(cache):
    planted(cache)
    cache.rename(cache.parent / "elsewhere")
    cache.symlink_to(cache.parent / "elsewhere")


def no_digests(cache):
    file = planted(cache)
    file.write_text(json.dumps({key: ["0"] for key in json.loads(file.read_text())}))


def no_json(cache):
    planted(cache).write_bytes(b"\xff[")


@pytest.mark.parametrize(
    "made",
    [anyones_file, anyones_folder, link_to_a_file, link_to_a_folder, no_digests, no_json],
)
def test_a_cache_that_others_can_write_is_not_believed(cache, weights, hashed, made):
    (true,) = digests.file_digests([str(weights)])
    made(cache)
    assert digests.file_digests([str(weights)]) == [true]
    assert len(hashed) == 2


def test_a_cache_that_can_not_be_made_costs_time_alone(tmp_path, weights, hashed, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SOMF_CACHE_DIR", str(tmp_path / "file/cache"))
    assert digests.file_digests([str(weights)]) == digests.file_digests([str(weights)])
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(cache, weights, monkeypatch):
    monkeypatch.setattr(digests, "_TOO_NEW", -1.0)
    real = digests.file_digest

    def slow(path):
        found = real(path)
        weights.write_bytes(b"changed meanwhile")
        return found

    monkeypatch.setattr(digests, "file_digest", slow)
    digests.file_digests([str(weights)])
    assert not cache.exists()


def test_digests_of_all_weight_files_count(tmp_path, family):
    from mergekit.common import ModelReference

    from somf_mergekit.prepass.weight_files import content_fingerprint

    found = set()
    for place in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", None):
        copy = tmp_path / str(place)
        shutil.copytree(family / "base", copy)
        tensors = tiny.tensors_of(copy)
        if place:
            tensors[place].view(-1)[-1] = torch.nextafter(
                tensors[place].view(-1)[-1], torch.ones(())
            )
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        found.add(content_fingerprint(ModelReference.parse(str(copy))))
    assert len(found) == 3
