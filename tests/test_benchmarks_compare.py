"""The comparison of merges: its data, its file, and the whole of it on tiny models."""

import itertools
import json

import pytest
import tiny
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions

import somf_mergekit
from benchmarks import compare, plain_dpo, real_data
from benchmarks.compare_inputs import FULL, halves, write_splits
from somf_mergekit.evaluate.sweep.sweep_file import read_file
from somf_mergekit.learner.loop import batches
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.recipe.validate import read_recipe
from somf_mergekit.repairs.catalogue import REPAIRS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with all sets, small and harmless."""
    folder = tmp_path_factory.mktemp("data")
    rows = tiny.preference_rows(40)
    tiny.write_jsonl(folder / "pku_saferlhf_pairs.jsonl", rows)
    forbidden = [{"prompt": f"how do i open a {word} box"} for word in tiny.WORDS]
    # One that is learned from, and one that stands there twice.
    forbidden += [{"prompt": rows[0]["prompt"]}, forbidden[0]]
    tiny.write_jsonl(folder / "harmful_dangerousqa.jsonl", forbidden)
    for name in ("math_gsm8k", "code", "general"):
        examples = [
            {"prompt": f"{name} {one} {two}", "response": f"mix {two} with {one} flour"}
            for one, two in itertools.product(tiny.WORDS[:6], tiny.WORDS[:6])
        ]
        tiny.write_jsonl(folder / f"{name}_train.jsonl", examples[:21])
        # The first of them was trained on.
        tiny.write_jsonl(folder / f"{name}_test.jsonl", examples[20:])
    return folder


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(real_data, "HELD_OUT_PAIRS", 12)


def prompts(file):
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_halves_share_no_key():
    items = [(key, number) for number in range(3) for key in "abcdefg"]
    one, two = halves(items, lambda item: item[0], seed=0)
    assert sorted(one + two) == sorted(items)
    assert not {key for key, _ in one} & {key for key, _ in two}
    assert len(one) - len(two) == 3
    assert halves(items, lambda item: item[0], seed=1) != (one, two)


def test_validation_and_test_share_no_prompt_with_each_other_or_with_training(data, tmp_path):
    pairs, held_out = real_data.write_sets(tmp_path, data)
    write_splits(tmp_path, data, pairs, held_out, FULL.sizes)
    asked = {
        split: {file.stem: prompts(file) for file in (tmp_path / split).glob("*.jsonl")}
        for split in ("validation", "test")
    }
    validation, test = ({p for of in sets.values() for p in of} for sets in asked.values())
    assert not validation & test
    trained = {pair.messages[-1]["content"] for pair in pairs}
    for name in ("math_gsm8k", "code", "general"):
        trained |= set(prompts(data / f"{name}_train.jsonl"))
    assert not trained & (validation | test)
    for split, sets in asked.items():
        assert len(sets["pairs"]) >= 5
        assert [len(sets[skill]) for skill in ("math", "code", "general")] == [
            8 - (split == "test")
        ] * 3
        # The harmless prompts are those of the same half's general answers.
        assert sets["harmless"] == sets["general"]
    harmful = asked["validation"]["harmful"] + asked["test"]["harmful"]
    assert sorted(harmful) == sorted(f"how do i open a {word} box" for word in set(tiny.WORDS))


def test_every_recipe_of_the_comparison_is_right():
    somf_mergekit.register()
    methods, variants = set(), []
    for name in compare.FILES:
        content = yaml.safe_load((compare.HERE / f"{name}.yml").read_text())
        found, problems = read_file(content).variants()
        assert problems == []
        variants += found
        methods |= {recipe.merge_method for variant in found for recipe in variant.recipes}
    assert methods == {"task_arithmetic", "ties", "dare_linear", "somf", *REPAIRS}
    # Seeds change what is learned and what is merged, and nothing else.
    (one, two, _) = (v for v in variants if v.entry == "somf")
    assert [v.learns.parameters["seed"] for v in (one, two)] == [0, 1]
    assert str(two.recipes[0].models[0].model) == "WORK/seed-1/models/math"
    # A mask of two serves three.
    (reused,) = (v for v in variants if v.label == "somf, mask learned on two of three, weight=1")
    assert reused.mask == f"WORK/sweep/masks/{one.mask}"


@pytest.mark.slow
def test_a_whole_comparison_leaves_its_record(data, tmp_path, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.save_model(tiny.tiny_llama(0, len(tokenizer)), tokenizer, tmp_path / "model")
    arguments = ["--work", tmp_path / "work", "--data", data, "--model", model, "--seeds", "5"]
    arguments += ["--quick", "--only", "math,somf,dpo,safemerge,general,somf_reused"]
    result = CliRunner().invoke(compare.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "work/compare.json").read_text())
    tested = {model["name"]: model["test"] for model in record["models"] if model["test"]}
    assert list(tested) == ["base", "math", "task_arithmetic", "somf", "dpo", "safemerge"]
    assert all([run["seed"] for run in runs] == [5] for n, runs in tested.items() if n != "base")
    values = [
        run["measures"]["pairs: preference margin"]["value"]
        for model in record["models"]
        for run in model["test"]
    ]
    assert len(set(values)) == len(values) == 7
    three = json.loads((tmp_path / "work/compare-three.json").read_text())
    assert "somf_reused" in {model["name"] for model in three["models"]}
    for name in compare.FILES:
        text = (tmp_path / f"work/{name}.md").read_text()
        assert (tmp_path / f"work/{name}.png").read_bytes().startswith(b"\x89PNG")
        # Nothing of this machine stands in the record, nor any text of the data.
        for content in (text, (tmp_path / f"work/{name}.json").read_text()):
            assert str(tmp_path) not in content.replace(str(data), "")
            assert "box" not in content
    # The documentation shows rows of it, by their names.
    page = "a\n\n<!-- compared: somf math general -->\n\n| old |\n| table |\n\nb\n"
    new = compare.shown(page, [record, three])
    assert compare.shown(new, [record, three]) == new
    rows = [line.split("|")[1].strip() for line in new.splitlines() if line.startswith("| ")]
    assert rows == ["model", "somf", "math specialist", "general specialist"]


def test_dpo_trains_on_the_pairs_and_in_the_order_that_a_mask_learns_from(
    family, family_recipe, tmp_path, monkeypatch
):
    source = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(80))
    plans = []
    monkeypatch.setattr(plain_dpo, "dpo_seconds", lambda m, o, plan, *_: plans.append(plan))
    options = {"--batch-size": 4, "--max-length": 48, "--seed": 3, "--max-steps": 30}
    arguments = [family / "base", tmp_path / "out", "--pairs", source]
    arguments += itertools.chain(*options.items())
    result = CliRunner().invoke(plain_dpo.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    learning = {name[2:].replace("-", "_"): value for name, value in options.items()}
    content = family_recipe(safety_dataset=str(source), **learning)
    planned = planned_merge(read_recipe(content), MergeOptions())
    data = checked_data(planned)
    assert len(data.held_out) == 8
    expected = [
        [data.pairs[row] for row in rows] for rows in batches(len(data.pairs), planned.settings, 30)
    ]
    (plan,) = plans
    assert len(plan) == len(expected)
    for parts, rows in zip(plan, expected, strict=True):
        found = [pair for part in parts for pair in part]
        assert sorted(map(repr, found)) == sorted(map(repr, rows))
