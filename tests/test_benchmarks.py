"""The benchmark's own parts; the measurements themselves are no test."""

import fnmatch
import json

import pytest
import tiny
import torch
from click.testing import CliRunner

from benchmarks import gpu, mask_routers, real_data, speed, speed_ways
from benchmarks.real_data import split_by_prompt, write_pairs
from benchmarks.speed_models import make_models, weight_count
from benchmarks.speed_table import write_record
from somf_mergekit.data.pairs import Pair
from somf_mergekit.demo.demo_data import demo_data, texts
from somf_mergekit.demo.demo_models import DemoSettings, word_tokenizer
from somf_mergekit.learner import passes, tensors


@pytest.fixture
def pairs():
    return [
        Pair((("user", f"how {number % 7}"),), f"no {number}", f"so {number}")
        for number in range(40)
    ]


def test_no_prompt_is_both_learned_from_and_measured_with(pairs):
    learned, held_out = split_by_prompt(pairs, 10, seed=0)
    assert len(held_out) == 10
    assert learned
    assert not {p.prompt for p in learned} & {p.prompt for p in held_out}
    assert split_by_prompt(pairs, 10, seed=0) == (learned, held_out)
    assert split_by_prompt(pairs, 10, seed=1) != (learned, held_out)


def tiny_pairs():
    rows = tiny.preference_rows(8)
    return [Pair((("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in rows]


@pytest.fixture
def own_process(monkeypatch):
    """Undo what a way changes in the process that it has for itself."""
    for name in ("SOMF_ENGINE", "SOMF_MICRO_BATCH_SIZE", "SOMF_BASE_PRECISION"):
        monkeypatch.setenv(name, "")
    for owner, name in (
        (tensors.MaskedTensor, "write"),
        (tensors.MaskedTensor, "update"),
        (passes.Passes, "learn"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.slow
def test_each_way_is_timed_and_tabulated(tmp_path, own_process):
    folder = tmp_path / "speed-tiny"
    rows = tiny_pairs()
    folder.mkdir()
    write_pairs(folder / "pairs.jsonl", rows)
    make_models(folder, "tiny", [pair.chosen for pair in rows])
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 32}
    options["granularity"] = "weight"
    options |= {"device": "cpu", "gpu_memory": None}
    found = {
        name: speed._measured_here(name, folder, options, "tiny")
        for name in speed.WAYS
        if name != speed.SHARDED and speed.has_way("tiny", name)
    }
    found |= {name: speed._measured_here(name, folder, options, "tiny") for name in speed.MERGES}
    for name in found.keys() & speed.WAYS.keys():
        assert len(found[name]["all_seconds"]) == 2
        assert found[name]["seconds"] == found[name]["all_seconds"][1] > 0
    assert all(row["peak_bytes"] > 0 for row in found.values())
    found["import"] = {"with": 2.0, "without": 1.0}
    weights = weight_count(folder / "base")
    text = write_record(found, weights, "tiny", {**options, "out": tmp_path / "out"})
    assert text == (tmp_path / "out/speed-tiny.md").read_text().rstrip()
    assert f"the model has {weights:,} weights" in text
    for name in found.keys() & set(speed.ENGINES):
        row = found[name]
        ratio = row["seconds"] / found["plain_dpo"]["seconds"]
        share = row["mask_seconds"] / row["seconds"]
        assert 0 < share < 1
        assert f"{name} engine | {row['seconds']:.2f} | {ratio:.2f} | {share:.0%} |" in text
    record = json.loads((tmp_path / "out/speed-tiny.json").read_text())
    assert "device" not in record["settings"]
    assert record["results"]["naive"]["all_seconds"] == found["naive"]["all_seconds"]
    # Measured again alone, under the same circumstances or others.
    again = {"somf": {**found["somf"], "seconds": 1234.0}, "import": found["import"]}
    text = write_record(again, weights, "tiny", {**options, "out": tmp_path / "out"})
    assert "| somf with a given mask | 1234.00 |" in text
    assert "RelaxedBernoulli" in text
    text = write_record(again, weights, "tiny", {**options, "steps": 3, "out": tmp_path / "out"})
    assert "RelaxedBernoulli" not in text


@pytest.mark.slow
def test_adapters_are_timed_beside_a_lora_that_learns(tmp_path, own_process):
    model, folder = "tiny-adapters", tmp_path / "speed-tiny-adapters"
    folder.mkdir()
    rows = tiny_pairs()
    write_pairs(folder / "pairs.jsonl", rows)
    make_models(folder, model, [pair.chosen for pair in rows])
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 32}
    options |= {"device": "cpu", "gpu_memory": None, "granularity": "row", "out": tmp_path}
    ways = ("lora_dpo", "factored", "factored_4bit")
    assert all(speed.has_way(model, name) and not speed.has_way("tiny", name) for name in ways)
    found = {name: speed._measured_here(name, folder, options, model) for name in ways}
    assert all(len(row["all_seconds"]) == 2 for row in found.values())
    text = write_record(found, 1, model, options)
    assert "DPO of a LoRA of rank 16 by PEFT" in text
    learned = json.loads((folder / "mask" / "somf.json").read_text())["learned_with"]
    assert (learned["engine"], learned["base_precision"]) == ("factored", "4bit")


def test_what_a_gpu_does_is_written_when_time_is_up(tmp_path):
    write_pairs(tmp_path / real_data.PAIRS.file, tiny_pairs())
    options = ["--device", "cpu", "--minutes", "0"]
    for name in ("--data", "--work", "--out"):
        options += [name, str(tmp_path)]
    result = CliRunner().invoke(gpu.main, options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "gpu_minutes.json").read_text())["results"]
    assert [*found] == [f"{job.name}: {way}" for job in gpu.JOBS for way in job.ways]
    assert all(row == {"failed": "no time left"} for row in found.values())
    assert result.output.count("no time left") == len(found) + 1
    for job in (*gpu.JOBS, *gpu.TINY):
        command = job.command(tmp_path, tmp_path, "cpu")
        assert command[1:3] == ["-m", "benchmarks.speed"]
        assert speed.main.make_context("speed", command[3:]).params["ways"] == job.ways


def test_what_a_gpu_took_is_tabulated_in_a_record_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 32}
    options |= {"device": "cuda", "gpu_memory": 24.0, "granularity": "row", "out": tmp_path}
    row = {"seconds": 2.0, "peak_bytes": 2**30}
    rows = {
        "plain_dpo": {**row, "peak_gpu_bytes": 3 * 2**30},
        "resident": {"failed": "exit code 1: no memory"},
        "task_arithmetic": row,
    }
    text = write_record(rows, 2**28, "tiny", options)
    assert "import torch" not in text
    assert "| bytes a weight | of the GPU, GiB | bytes a weight |" in text
    assert (
        "| plain DPO, all weights by AdamW | 2.000 | 1.00 |  | 1.00 | 1.00 | 4.0 | 3.00 | 12.0 |"
        in text
    )
    assert "exit code 1: no memory | | | | | | | |" in text
    record = json.loads((tmp_path / "speed-tiny-gpu-24gib-row.json").read_text())
    assert record["gpu"] == "a GPU"
    assert record["settings"]["gpu_memory"] == 24.0


@pytest.mark.slow
def test_the_naive_way_merges_by_the_formula(tmp_path):
    rows = [
        Pair((("user", r["prompt"]),), r["chosen"], r["rejected"]) for r in tiny.preference_rows(8)
    ]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    make_models(tmp_path, "tiny", [pair.chosen for pair in rows])
    work = speed_ways.Work(tmp_path, tmp_path / "pairs.jsonl", 1, 4, 2, 32)
    naive = speed_ways._NaiveModel(work, seed=0)
    torch.manual_seed(3)
    naive.draw()
    torch.manual_seed(3)
    base, one, two = (tiny.tensors_of(tmp_path / name) for name in ("base", "math", "code"))
    name = "model.embed_tokens.weight"
    half = torch.zeros_like(base[name]).float()
    mask = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=half).rsample()
    change = 0.5 * (one[name].float() - base[name]) + 0.5 * (two[name].float() - base[name])
    torch.testing.assert_close(
        naive.model.model.embed_tokens.weight, base[name].float() + change * mask / mask.mean()
    )


def test_routes_are_the_experts_that_each_token_takes():
    settings = DemoSettings(hidden_size=16, layers=2)
    data = demo_data(0, train=8, held_out=2)
    tokenizer = word_tokenizer(texts(data))
    model = mask_routers.new_mixture(tokenizer, settings, 0).eval()
    routers = fnmatch.filter(model.state_dict(), mask_routers.ROUTERS)
    assert routers == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    taken = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: taken.append(given[1]))
    found = mask_routers.routes(model, tokenizer, data, settings)
    assert torch.equal(found, torch.cat(taken).sort().values)
    assert len(found.unique(dim=0)) > 1


def test_router_masks_are_tabulated():
    rows = [
        {"seed": seed, "model": name, **dict.fromkeys(mask_routers.MEASURES, value)}
        for seed in range(2)
        for name, value in (("base", 0.5), ("row-masked", seed / 4))
    ]
    lines = mask_routers.table(rows).splitlines()
    assert lines[2] == "| base" + " | 50 %" * 7 + " |"
    assert lines[3] == "| row-masked" + " | 12 %" * 7 + " |"
    assert lines[-1] == "Means of 2 seed(s), on held-out prompts."
