"""The benchmark's own parts; the measurements themselves are no test."""

import hashlib
import json
from dataclasses import asdict

import pytest
import tiny
import torch
from click.testing import CliRunner

from benchmarks import needs, speed, speed_ways
from benchmarks.real_data import split_by_prompt, write_pairs
from benchmarks.real_measures import Measuring, content_key, measured
from benchmarks.real_model import main
from benchmarks.real_recipes import recipes
from benchmarks.real_table import MODELS, TABLES, markdown_table, write_results
from benchmarks.speed_models import make_models
from benchmarks.speed_table import write_record
from somf_mergekit.learner import passes, tensors
from somf_mergekit.preferences import Pair
from somf_mergekit.recipe_check import read_recipe, recipe_problems


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


def test_every_recipe_of_the_benchmark_is_right(tmp_path):

    for name, content in recipes(tmp_path).items():
        if content["merge_method"] == "somf":
            config = read_recipe(content)
            assert recipe_problems(config) == [], name


def test_a_model_is_measured_once(family, tmp_path, pairs):
    work, data = tmp_path / "work", tmp_path / "data"
    work.mkdir()
    data.mkdir()
    write_pairs(work / "held_out_pairs.jsonl", pairs[:4])
    write_pairs(work / "safety_pairs.jsonl", pairs[4:])
    tiny.write_jsonl(
        data / "harmful_dangerousqa.jsonl", [{"prompt": "how 5"}, {"prompt": "bomb cake"}]
    )
    rows = [{"prompt": f"mix {word}", "response": f"mix {word} flour"} for word in "abc"]
    for name in ("math_gsm8k_test", "code_test", "general_test"):
        tiny.write_jsonl(data / f"{name}.jsonl", rows)
    measuring = Measuring(max_new_tokens=3, batch_size=2)
    found = measured(family / "base", work, data, measuring)
    assert set(found) == {
        "refusals",
        "over_refusals",
        "preference_accuracy",
        "math_loss",
        "code_loss",
    }
    assert found["math_loss"] == found["code_loss"] > 0
    answers = {path.name.split("-")[1]: path for path in (work / "answers").iterdir()}
    assert set(answers) == {"refusals.json", "over_refusals.json"}
    # The prompt that stands among the pairs learned from is not asked.
    assert len(json.loads(answers["refusals.json"].read_text())) == 1
    for file in answers.values():
        file.unlink()
    assert measured(family / "base", work, data, measuring) == found
    assert not list((work / "answers").iterdir())
    assert content_key(family / "base", measuring) != content_key(family / "math", measuring)


def test_results_of_earlier_runs_are_found_again(family):
    measuring = Measuring(pairs=7)
    digest = hashlib.sha256(json.dumps(asdict(measuring), sort_keys=True).encode())
    for name in ("model.safetensors", "tokenizer.json"):
        digest.update(name.encode() + (family / "base" / name).read_bytes())
    assert content_key(family / "base", measuring) == digest.hexdigest()[:16]


def test_the_table_and_its_record(tmp_path):
    row = {
        "refusals": 0.5,
        "over_refusals": 0.0,
        "preference_accuracy": 0.6,
        "math_loss": 1.0,
        "code_loss": 2.0,
    }
    settings = {"measuring": {"harmful_prompts": 1, "max_new_tokens": 2, "harmless_prompts": 3}}
    settings["measuring"] |= {"pairs": 4, "skill_answers": 5}
    table = write_results(tmp_path, "command", settings, {"somf_soft": row, "ties": row})
    assert table.startswith("## What a safe merge gives")
    assert markdown_table({"somf_soft": row}) in table
    assert markdown_table({"ties": row}) in table
    assert "| somf, learned mask, soft | 50% | 0% | 0.600 | 1.000 | 2.000 |" in table
    assert table in (tmp_path / "real_model.md").read_text()
    record = json.loads((tmp_path / "real_model.json").read_text())
    assert record["results"] == {"somf_soft": row, "ties": row}
    assert record["packages"]["mergekit"].startswith("0.1")


def test_help_says_what_it_needs():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "Needs the package" in result.output
    for step in ("prepare", "merge", "evaluate", "table", "run"):
        assert step in result.output


def test_every_recipe_is_named_in_the_tables(tmp_path):
    assert set(recipes(tmp_path)) <= set(MODELS)
    assert {name for names in TABLES.values() for name in names} == set(MODELS)


def tiny_pairs():
    rows = tiny.preference_rows(8)
    return [Pair((("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in rows]


def test_each_way_is_timed_and_tabulated(tmp_path, monkeypatch):
    # What a way changes in the process that it has for itself.
    for name in ("SOMF_ENGINE", "SOMF_MICRO_BATCH_SIZE"):
        monkeypatch.setenv(name, "")
    for owner, name in (
        (tensors.MaskedTensor, "write"),
        (tensors.MaskedTensor, "update"),
        (passes.Passes, "learn"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    folder = tmp_path / "speed-tiny"
    rows = [
        Pair((("user", r["prompt"]),), r["chosen"], r["rejected"]) for r in tiny.preference_rows(8)
    ]
    folder.mkdir()
    write_pairs(folder / "pairs.jsonl", rows)
    make_models(folder, "tiny", [pair.chosen for pair in rows])
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 32}
    options |= {"device": "cpu", "gpu_memory": None}
    found = {
        name: speed._measured_here(name, folder, options, "tiny")
        for name in speed.WAYS
        if name != speed.SHARDED
    }
    shown = {**options, "batch_size": 4}
    found[speed.SHARDED] = speed._in_a_process(speed.SHARDED, "tiny", tmp_path, shown)
    found |= {name: speed._measured_here(name, folder, options, "tiny") for name in speed.MERGES}
    for name in speed.WAYS:
        assert len(found[name]["all_seconds"]) == 2
        assert found[name]["seconds"] == found[name]["all_seconds"][1] > 0
    assert all(row["peak_bytes"] > 0 for row in found.values())
    found["import"] = {"with": 2.0, "without": 1.0}
    weights = speed._weight_count(folder / "base")
    text = write_record(found, weights, "tiny", {**options, "out": tmp_path / "out"})
    assert text == (tmp_path / "out/speed-tiny.md").read_text().rstrip()
    assert f"the model has {weights:,} weights" in text
    for name in speed.ENGINES:
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


def test_what_a_gpu_took_is_tabulated_in_a_record_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 32}
    options |= {"device": "cuda", "gpu_memory": 24.0, "out": tmp_path}
    row = {"seconds": 2.0, "peak_bytes": 2**30}
    rows = {
        "plain_dpo": {**row, "peak_gpu_bytes": 3 * 2**30},
        "resident": {"failed": "exit code 1: no memory"},
        "task_arithmetic": row,
        "import": {"with": 2.0, "without": 1.0},
    }
    text = write_record(rows, 2**28, "tiny", options)
    assert "| bytes a weight | of the GPU, GiB |" in text
    assert "| plain DPO, all weights by AdamW | 2.00 | 1.00 |  | 1.00 | 1.00 | 4.0 | 3.00 |" in text
    assert "exit code 1: no memory | | | | | | |" in text
    record = json.loads((tmp_path / "speed-tiny-gpu.json").read_text())
    assert record["gpu"] == "a GPU"
    assert record["settings"]["gpu_memory"] == 24.0


def test_needs_of_known_shapes_are_tabulated():
    result = CliRunner().invoke(needs.main, ["--micro-batch", "1"])
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:7] for line in result.output.splitlines()[2:]]
    assert len(rows) == len(needs.SHAPES)
    numbers = [[float(cell.split()[0]) for cell in row[1:]] for row in rows]
    for resident, streaming, disk, on_gpu, host in numbers:
        assert streaming < on_gpu < resident / 3
        assert disk == host
    assert numbers == sorted(numbers)


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
