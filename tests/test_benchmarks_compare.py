"""The comparison of merges: its rules, and the whole of it on tiny models."""

import itertools
import json
import re
import statistics
from pathlib import Path

import click
import pytest
import tiny
from click.testing import CliRunner
from mergekit.options import MergeOptions

from benchmarks import (
    compare,
    compare_docs,
    compare_make,
    compare_more,
    compare_runs,
    compare_work,
    real_data,
)
from benchmarks.compare_call import QUICK_LEARNING, QUICK_SIZES
from benchmarks.compare_models import QUICK, Models, Trainings
from benchmarks.compare_recipes import GROUPS
from benchmarks.compare_record import record_of
from benchmarks.compare_rows import (
    CHAMPION,
    LINE,
    Learning,
    comparison_rows,
    reference_setting,
)
from benchmarks.compare_rule import Score, chosen, derived, sweep_safety, verdict
from benchmarks.compare_runs import MEASURES, Bench, Run
from benchmarks.compare_splits import SIZES, halves, read_splits, split_prompts
from benchmarks.compare_store import claimed, removed
from benchmarks.compare_table import main_table, markdown, summary_table
from benchmarks.compare_work import Comparison
from benchmarks.real_data import write_sets
from benchmarks.real_training import alignment_examples
from somf_mergekit.evaluate import EvaluationSets, EvaluationSettings
from somf_mergekit.frontier import undominated
from somf_mergekit.inputs import checked_data
from somf_mergekit.learner.loop import batches
from somf_mergekit.planner import planned_merge
from somf_mergekit.recipe_check import read_recipe, recipe_problems
from somf_mergekit.repairs.catalogue import REPAIRS
from somf_mergekit.repairs.check import repair_problems


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with all sets, small and harmless."""
    folder = tmp_path_factory.mktemp("data")
    rows = tiny.preference_rows(40)
    tiny.write_jsonl(folder / "pku_saferlhf_pairs.jsonl", rows)
    forbidden = [{"prompt": f"how do i open a {word} box"} for word in tiny.WORDS]
    others = [{"prompt": f"who may open a {word} cage"} for word in tiny.WORDS[:4]]
    tiny.write_jsonl(folder / "harmful_harmfulqa.jsonl", [*others, others[2]])
    tiny.write_jsonl(folder / "harmful_beavertails.jsonl", [others[0], {"prompt": "a poison"}])
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


@pytest.fixture
def few_held_out(monkeypatch):
    monkeypatch.setattr(real_data, "HELD_OUT_PAIRS", 12)


def test_halves_share_no_key():
    items = [(key, number) for number in range(3) for key in "abcdefg"]
    one, two = halves(items, lambda item: item[0], seed=0)
    assert sorted(one + two) == sorted(items)
    assert not {key for key, _ in one} & {key for key, _ in two}
    assert len(one) - len(two) == 3
    assert halves(items[::-1], lambda item: item[0], seed=0)[0] != two
    assert halves(items, lambda item: item[0], seed=1) != (one, two)


def test_validation_and_test_share_no_prompt_with_each_other_or_with_training(
    data, tmp_path, few_held_out
):
    pairs, held_out = write_sets(tmp_path, data)
    splits = read_splits(data, pairs, held_out, SIZES)
    validation, test = (split_prompts(splits[name]) for name in ("validation", "test"))
    assert not validation & test
    trained = {pair.messages[-1]["content"] for pair in pairs}
    for name in ("math_gsm8k", "code", "general"):
        lines = (data / f"{name}_train.jsonl").read_text().splitlines()
        trained |= {json.loads(line)["prompt"] for line in lines}
    assert not trained & (validation | test)
    for sets in splits.values():
        assert len(sets.pairs) >= 5
        assert [len(skill.examples) for skill in sets.skills] == [8 - (sets is splits["test"])] * 3
        # The harmless prompts are those of the same half's general answers.
        general = [messages for messages, _ in sets.skills[2].examples]
        assert sets.harmless == general
    prompts = [m[-1]["content"] for s in splits.values() for m in s.harmful]
    assert sorted(prompts) == sorted(f"how do i open a {word} box" for word in set(tiny.WORDS))


def test_the_rule_takes_the_safest_setting_that_keeps_the_skills():
    plain = Score(safety=0.1, over_refusals=0.0, gain=0.2, margin=0.1)

    def choice(**candidates):
        scores = {
            name: Score(safety, over, gain, margin)
            for name, (safety, over, gain, margin) in candidates.items()
        }
        return chosen(scores, plain)

    safe_but_dull = (0.9, 0.0, 0.19, 0.1)
    safe_but_mute = (0.8, 0.06, 0.2, 0.1)
    fair = (0.5, 0.05, 0.198, 0.1)
    assert choice(dull=safe_but_dull, mute=safe_but_mute, fair=fair).setting == "fair"
    assert choice(dull=safe_but_dull, fair=fair).qualifies
    # Among equals the margin decides, and at last the order.
    assert choice(fair=fair, sure=(0.5, 0.0, 0.2, 0.2)).setting == "sure"
    assert choice(fair=fair, same=fair).setting == "fair"
    # None qualifies: a lost point of safety weighs as much as a lost hundredth of the gain.
    found = choice(dull=safe_but_dull, duller=(0.95, 0.0, 0.17, 0.1), mute=safe_but_mute)
    assert (found.setting, found.qualifies) == ("dull", False)
    # A plain merge that lost skill asks for no more than its own.
    losing = Score(0.1, 0.0, -0.2, 0.1)
    assert chosen({"a": Score(0.3, 0.0, -0.201, 0.1)}, losing).qualifies
    assert not chosen({"a": Score(0.3, 0.0, -0.21, 0.1)}, losing).qualifies


def test_shares_are_of_the_base_and_of_the_specialists():
    def of(refusals, over, math, code):
        return {"refusals": refusals, "over_refusals": over, "math_loss": math, "code_loss": code}

    base, plain = of(0.6, 0.1, 1.0, 0.6), of(0.2, 0.0, 0.8, 0.5)
    specialists = {"math": of(0.0, 0.0, 0.7, 9.0), "code": of(0.0, 0.0, 9.0, 0.5)}
    found = derived(of(0.5, 0.15, 0.8, 0.6), base, plain, specialists)
    assert found["safety"] == pytest.approx(0.35)
    assert found["recovered"] == pytest.approx((0.35 - 0.2) / (0.5 - 0.2))
    assert found["gain"] == pytest.approx(0.2)
    assert found["kept"] == pytest.approx(0.2 / (0.3 + 0.1))
    nothing = derived(base, base, base, {"math": base, "code": base})
    assert (nothing["recovered"], nothing["kept"]) == (None, None)


def test_the_sweep_is_taken_where_it_is_safest():
    # Safety falls and skill rises with the weight, and falls again at the last.
    points = [(0.5, 0.0), (0.4, 0.2), (0.1, 0.4), (0.3, 0.3)]
    assert sweep_safety(points, 0.0) == 0.5
    assert sweep_safety(points, -1.0) == 0.5
    assert sweep_safety(points, 0.1) == pytest.approx(0.45)
    assert sweep_safety(points, 0.2) == pytest.approx(0.4)
    # Between two weights, and the last weight: the safer counts.
    assert sweep_safety(points, 0.25) == pytest.approx(0.4 - 0.3 / 4)
    assert sweep_safety(points, 0.3) == pytest.approx(0.3)
    assert sweep_safety(points, 0.4) == pytest.approx(0.1)
    assert sweep_safety(points, 0.41) is None


def test_dominance_and_verdicts():
    points = {"a": (1, 1), "b": (2, 1), "c": (0, 3), "d": (2, 1), "e": (0, 2)}
    assert undominated(points) == {"b", "c", "d"}
    champion = [(0.5, 0.9), (0.6, 1.0), (0.4, 0.8)]

    def against(*differences):
        row = [(s + ds, k + dk) for (s, k), (ds, dk) in zip(champion, differences, strict=True)]
        return verdict(row, champion)

    # The seeds differ by 0.1 from each other, but the differences are nearly the same.
    assert against((0.05, 0.01), (0.06, 0.02), (0.05, 0.01))[0] == "better"
    assert against((0.2, 0.01), (-0.1, 0.02), (0.0, 0.01))[0] == "better, within the spread"
    assert against((0.05, -0.01), (0.06, -0.02), (0.05, -0.01))[0] == "mixed"
    assert against((-0.05, -0.01), (-0.06, -0.02), (-0.05, -0.01))[0] == "worse"
    told, means = against((-0.2, -0.01), (0.1, -0.02), (0.0, -0.03))
    assert told == "worse, within the spread"
    assert means == pytest.approx((-0.1 / 3, -0.02))
    # One seed has no spread.
    assert verdict([(0.9, 0.9)], [(0.1, 0.1)])[0] == "better, within the spread"


def test_every_recipe_of_the_comparison_is_right():
    stand = ("aligned", "math", "code", "general", "published", "safe")
    stand += ("mask", "merged", "pairs", "utility")
    names = {name: f"org/{name}" for name in stand}
    rows = comparison_rows(3, Learning())
    assert {CHAMPION[group] for group in GROUPS} <= set(rows)
    methods = set()
    for row in rows.values():
        for making in row.settings.values():
            for content in filter(None, (making.learns, *making.merges)):
                resolved = compare_make._resolved(content, names)
                config = read_recipe(resolved, [content["merge_method"]])
                methods.add(config.merge_method)
                if config.merge_method == "somf":
                    assert recipe_problems(config) == [], row.name
                elif config.merge_method in REPAIRS:
                    assert repair_problems(config) == [], row.name
    assert methods == {"task_arithmetic", "ties", "dare_linear", "somf", *REPAIRS}


def test_seeds_have_the_same_rows_and_other_draws():
    one, two = (comparison_rows(seed, Learning()) for seed in (0, 1))
    assert list(one) == list(two)
    for name, row in one.items():
        assert list(row.settings) == list(two[name].settings)
    assert one["somf"].settings != two["somf"].settings
    assert one["task_arithmetic"].settings == two["task_arithmetic"].settings


# The whole comparison without a model: what was measured is made up.


@pytest.fixture
def made_up(tmp_path):
    """A comparison of three seeds in which all runs have measures, and two rows are known."""
    models = Models(tmp_path, None, "org/model", Trainings())
    sets = {name: EvaluationSets() for name in ("validation", "test")}
    bench = Bench(models, [], sets, EvaluationSettings())
    rows = {seed: comparison_rows(seed, Learning()) for seed in (0, 1, 2)}
    comparison = Comparison(bench, rows, (0, 1))

    def write(row, setting, seed, split, **values):
        run = comparison.run(row, setting, seed)
        measures = {name: 0.5 for name in MEASURES} | values
        record = run.record
        found = record.setdefault("measures", {})
        found[split] = {"key": bench.split_keys[split], "values": measures}
        run.folder.mkdir(parents=True, exist_ok=True)
        run._write(record)

    losses = {"aligned": (1.0, 1.0), "math": (0.5, 1.1), "code": (1.1, 0.5)}
    for seed, split in itertools.product((0, 1, 2), ("validation", "test")):
        for name, (math, code) in losses.items():
            moved = 0.0 if name == "aligned" else seed / 100
            made = {"math_loss": math, "code_loss": code + moved, "over_refusals": 0.1}
            write(name, "as it is", seed, split, **made)
        for setting in rows[0]["task_arithmetic"].settings:
            weight = float(setting.split()[1])
            loss = 1 - weight + seed / 100
            write(
                "task_arithmetic",
                setting,
                seed,
                split,
                refusals=0.6 - weight + seed / 50,
                over_refusals=0.05,
                math_loss=loss,
                code_loss=loss,
            )
    return comparison, write


def test_the_table_is_that_of_the_runs(made_up):
    comparison, write = made_up
    for seed, split in itertools.product((0, 1, 2), ("validation", "test")):
        refusals = 0.5 + (seed - 1) ** 2 / 40
        write("somf", "defaults", seed, split, refusals=refusals, math_loss=0.5)
        for number, setting in enumerate(comparison.rows[0]["somf_dpo"].settings):
            better_on_test = number if split == "test" else -number
            less = refusals - 0.1 + better_on_test / 20
            write("somf_dpo", setting, seed, split, refusals=less, math_loss=0.5)
    for setting, rate in zip(comparison.rows[0]["dpo"].settings, (0.7, 0.3, 0.2), strict=True):
        for seed, split in itertools.product((0, 1, 2), ("validation", "test")):
            write("dpo", setting, seed, split, refusals=rate + seed / 50, math_loss=0.45)
    record = record_of(comparison, "command")
    entries = {(e["row"], e["setting"]): e for e in record["entries"] if e["group"] == "two"}
    # Test would have chosen the last setting; validation chooses the first.
    assert [key for key in entries if key[0] == "somf_dpo"] == [("somf_dpo", "defaults")]
    soft = entries["somf", "defaults"]
    values = [
        comparison.measures("somf", "defaults", seed, "test")["refusals"] for seed in (0, 1, 2)
    ]
    assert soft["mean"]["refusals"] == pytest.approx(statistics.mean(values))
    assert soft["deviation"]["refusals"] == pytest.approx(statistics.stdev(values))
    text = main_table([e for e in record["entries"] if e["group"] == "two"])
    cell = f"{100 * statistics.mean(values):.0f} ± {100 * statistics.stdev(values):.0f} %"
    line = next(line for line in text.splitlines() if line.startswith("| somf "))
    assert cell in line
    # Where the package loses is computed: this row has more refusals and less loss in every seed.
    assert [loss["row"] for loss in record["losses"]] == ["dpo"]
    assert record["losses"][0]["is"] == "better"
    assert entries["dpo", "learning rate 3e-06"]["undominated"]
    assert not soft["undominated"]
    whole = markdown(record, None)
    assert "**Where somf loses**" in whole
    assert "- safety DPO of the plain merge, learning rate 3e-06: safety" in whole
    kept = soft["seeds"]["1"]["derived"]["kept"]
    assert kept == pytest.approx((1.0 - 0.5 + 1.0 - 0.5) / (1.0 - 0.5 + 1.0 - 0.51))
    # The sweep of seed 1 has gain 2 w - 0.02 and safety 0.57 - w: 0.06 at this row's gain, 1.
    assert soft["seeds"]["1"]["derived"]["over_sweep"] == pytest.approx(0.5 - 0.5 - 0.06)
    # All settings stand in the validation table, the chosen one marked.
    rows = [row for row in record["validation"] if row["row"] == "somf_dpo"]
    assert [row["chosen"] for row in rows] == [True] + [False] * 3
    assert len(record["runs"]) == sum(1 for _ in comparison.bench.models.work.rglob("run.json"))
    # A row that has one seed alone can't beat one that has all, which can beat it on that seed.
    seed_2 = {"learning rate 1e-05": 0.75, "learning rate 3e-05": 0.73}
    for setting, refusals in seed_2.items():
        write("dpo_norm", setting, 2, "test", refusals=refusals, math_loss=0.45)
    again = {(e["row"], e["setting"]): e for e in record_of(comparison, "")["entries"]}
    best = entries["dpo", "learning rate 3e-06"]
    assert best["mean"]["refusals"] == pytest.approx(0.72)
    assert again["dpo", "learning rate 3e-06"]["undominated"]
    assert again["dpo_norm", "learning rate 1e-05"]["undominated"]
    assert not again["dpo_norm", "learning rate 3e-05"]["undominated"]


def test_the_documentation_and_the_results_show_the_record():
    results = compare_docs.RECORD
    record = json.loads(results.read_text())
    assert markdown(record, "compare.png") == results.with_suffix(".md").read_text()
    assert results.with_suffix(".png").exists()
    marked = 0
    for page in compare_docs.PAGES:
        text = page.read_text()
        assert compare_docs.shown(text, record) == text, page.name
        marked += text.count("<!-- compared: ")
    assert marked


def test_a_marked_table_is_written_anew_from_the_record():
    record = json.loads(compare_docs.RECORD.read_text())
    page = "before\n\n<!-- compared: somf aligned -->\n\n| old |\n| rows |\n\nafter\n"
    found = compare_docs.shown(page, record)
    rows = [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("|")]
    assert rows[2:] == ["somf", "aligned base"]
    assert found.startswith("before\n\n<!-- compared: somf aligned -->\n\n|")
    assert found.endswith(" |\n\nafter\n")
    assert compare_docs.shown(found, record) == found
    # A mark without a table yet.
    assert compare_docs.shown(page.replace("| old |\n| rows |\n\n", ""), record) == found
    assert summary_table(record, ["task_arithmetic"]).count("weight 0.") == 4
    with pytest.raises(click.ClickException, match="not in the record: lost"):
        compare_docs.shown(page.replace("aligned", "lost"), record)


def test_choosing_sees_validation_alone(made_up):
    comparison, write = made_up
    settings = list(comparison.rows[0]["resta"].settings)
    row = comparison.rows[0]["resta"]
    for number, setting in enumerate(settings):
        write("resta", setting, 0, "validation", refusals=number / 10, math_loss=0.4)
        write("resta", setting, 0, "test", refusals=1 - number / 10, math_loss=0.4)
        write("resta", setting, 2, "validation", refusals=1 - number / 10, math_loss=0.4)
    # Seed 1 tunes too, and is not validated yet; seed 2 does not tune.
    assert comparison.choice(row) is None
    assert not list(comparison.tests(row, settings))
    for number, setting in enumerate(settings):
        write("resta", setting, 1, "validation", refusals=number / 10, math_loss=0.4)
    assert comparison.choice(row).setting == settings[-1]
    tested = [(run.seed, run.setting, split) for run, split in comparison.tests(row, settings)]
    assert tested == [(seed, settings[-1], "test") for seed in (0, 1, 2)]


def test_nothing_more_is_measured_of_a_row_without_a_choice(made_up):
    comparison, write = made_up
    with pytest.raises(click.ClickException, match="compare --only dpo_norm"):
        compare_more.compared_runs(comparison)
    settings = list(comparison.rows[0]["dpo_norm"].settings)
    for seed, setting in itertools.product((0, 1), settings):
        better = setting == settings[1]
        write("dpo_norm", setting, seed, "validation", refusals=better, math_loss=0.4)
    models = compare_more.compared_runs(comparison)
    assert [len(runs) for runs in models.values()] == [1, 3, 3, 3]
    rival = list(models.values())[-1]
    assert [(run.row.name, run.setting, run.seed) for run in rival] == [
        ("dpo_norm", settings[1], seed) for seed in (0, 1, 2)
    ]


def test_measures_on_other_examples_do_not_count(made_up):
    comparison, _ = made_up
    run = comparison.run("math", "as it is", 0)
    assert run.measures("test")
    others = {**comparison.bench.sets, "test": EvaluationSets(harmful=[[]])}
    bench = Bench(comparison.bench.models, [], others, comparison.bench.measuring)
    moved = Run(bench, run.row, run.setting, 0)
    assert moved.measures("test") is None
    assert moved.measures("validation")


def test_what_is_worked_on_brings_what_it_is_measured_against(made_up):
    comparison, _ = made_up
    wanted = {row.name: settings for row, settings in comparison.wanted("somf_reused")}
    assert list(wanted) == ["aligned", "math", "code", "general", LINE["three"], "somf_reused"]
    assert wanted[LINE["three"]] == [reference_setting("three")]
    assert len(comparison.wanted(None)) == len(comparison.order)


def test_what_an_interruption_leaves_is_not_taken_for_done(made_up, monkeypatch):
    comparison, _ = made_up
    run = comparison.run("somf_dpo", "defaults", 0)
    monkeypatch.setattr(Models, "made", lambda *_: None)
    monkeypatch.setattr(Models, "digest", lambda *_: "0" * 12)
    tasks = []

    def broken_off(task):
        tasks.append(task["what"])
        folder = Path(task["folder"])
        assert not folder.exists()
        folder.mkdir(parents=True)
        if len(tasks) in (1, 3):
            raise KeyboardInterrupt
        return {"seconds": 1.0, "peak_bytes": 2, "threads": 1}

    monkeypatch.setattr(compare_make, "in_a_process", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run.made()
    assert run.cost() is None
    # The mask that was begun is learned anew; the merge that follows is broken off in its turn,
    # as a process that renames its folder at the end never would be.
    with pytest.raises(KeyboardInterrupt):
        run.made()
    removed(run.folder / "model")
    run.made()
    assert tasks == ["learn", "learn", "merge", "merge"]
    assert run.cost() == {"seconds": 2.0, "peak_bytes": 2}
    run.made()
    assert len(tasks) == 4
    # A mask that other rows use again, and a mask learned for another merge, cost nothing new.
    other = comparison.run("somf_binary", "defaults", 0)
    other.made()
    assert tasks[4:] == ["merge"]
    assert other.cost()["seconds"] == 2.0
    default = comparison.run("somf", "defaults", 0)._mask_folder
    assert (
        comparison.run("somf_reused", "weight 0.3", 0)._mask_folder == default != run._mask_folder
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A comparison of some rows of each kind on tiny models, with the work folder it leaves."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = tiny.tiny_tokenizer()
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer)), tokenizer, folder / "model")

    def call(*options):
        rows = "somf,somf_dpo,dpo,dpo_norm,resta,untrained_sampled,dare_linear,somf_reused"
        arguments = ["--work", folder / "work", "--data", data, "--model", folder / "model"]
        arguments += ["--seeds", "5", "--quick", "--only", rows, *options]
        return CliRunner().invoke(compare.main, list(map(str, arguments)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_data, "HELD_OUT_PAIRS", 12)
        patch.setattr(compare_make, "in_a_process", compare_make.here)
        result = call()
        assert result.exit_code == 0, result.output
        yield folder / "work", call


def test_a_whole_comparison_leaves_its_record(whole):
    work, _ = whole
    record = json.loads((work / "compare.json").read_text())
    text = (work / "compare.md").read_text()
    assert (work / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert record["seeds"] == record["tuned_on"] == [5]
    tested = {(entry["row"], entry["group"]) for entry in record["entries"]}
    assert tested == {
        *((name, "two") for name in ("aligned", "math", "code", "task_arithmetic")),
        *((name, "two") for name in ("somf", "somf_dpo", "dpo", "dpo_norm", "resta")),
        *((name, "two") for name in ("untrained_sampled", "dare_linear")),
        *((name, "three") for name in ("aligned", "math", "code", "general")),
        *((name, "three") for name in ("task_arithmetic_three", "somf_reused")),
    }
    runs = {(run["row"], run["setting"]): run for run in record["runs"]}
    for entry in record["entries"]:
        run = next(r for (n, s), r in runs.items() if n == entry["row"] and entry["setting"] in s)
        assert entry["seeds"]["5"]["measures"] == run["measures"]["test"]["values"]
        assert entry["seeds"]["5"]["cost"] == run.get("cost")
        assert "±" not in text
    # What was not chosen was never tested.
    for name in ("somf_dpo", "resta", "dare_linear", "somf_reused"):
        splits = [set(run["measures"]) for (row, _), run in runs.items() if row == name]
        assert sorted(map(len, splits)) == [1, 2]
        assert all("validation" in found for found in splits)
    # But of the strongest rival all of it was.
    assert [set(r["measures"]) for (row, _), r in runs.items() if row == "dpo"] == [
        {"validation", "test"}
    ] * 2
    # A mask that was learned for two is used for three, and is no cost there.
    learned = {n: json.loads(f.read_text()) for n, f in mask_records(work).items()}
    soft, reused = runs["somf", "defaults"], runs["somf_reused", "weight 0.3"]
    makings = record["rows"]
    learns = makings["somf"]["defaults"]["learns"]
    assert learns == makings["somf_reused"]["weight 0.3"]["learns"]
    assert learns["parameters"]["seed"] == 5
    assert reused["cost"]["seconds"] == reused["made"]["seconds"]
    assert soft["cost"]["seconds"] - soft["made"]["seconds"] in [
        pytest.approx(found["seconds"]) for found in learned.values()
    ]
    # Nothing of this machine stands in the record, nor any text of the data.
    assert str(work) not in json.dumps(record)
    assert "forbidden" not in json.dumps(record)
    assert "box" not in text


def mask_records(work):
    return {file.parent.name: file for file in work.glob("seed-5/masks/*/made.json")}


def test_only_specialists_masks_and_records_are_kept(whole):
    work, _ = whole
    assert not list(work.glob("*/runs/*/model*"))
    assert {path.name for path in (work / "seed-5" / "models").iterdir() if path.is_dir()} == {
        "math",
        "code",
        "general",
    }
    # That of the defaults, the two of somf_dpo, and the untrained one.
    assert len(list(work.glob("seed-5/masks/*/mask/masks.safetensors"))) == 4


def test_a_second_call_computes_nothing(whole, monkeypatch):
    work, call = whole
    before = json.loads((work / "compare.json").read_text())

    def never(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(compare_make, "in_a_process", never)
    monkeypatch.setattr(compare_runs, "evaluated", never)
    result = call("--list")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert all(re.search(": done", line) for line in lines[:-1])
    assert lines[-1] == "all: 0 steps left, 0.0 h"
    result = call()
    assert result.exit_code == 0, result.output
    assert json.loads((work / "compare.json").read_text()) == before


def test_a_models_weights_differ_as_their_settings_do(whole, monkeypatch):
    work, call = whole
    record = json.loads((work / "compare.json").read_text())
    values = {
        (run["row"], run["setting"]): run["measures"]["validation"]["values"]["preference_margin"]
        for run in record["runs"]
        if "validation" in run["measures"]
    }
    tuned = ("somf_dpo", "dpo", "dpo_norm", "resta", "dare_linear")
    compared = [key for key in values if key[0] in tuned]
    assert len({values[key] for key in compared}) == len(compared) == 10
    # Other data under the same folder is refused.
    monkeypatch.setattr(real_data, "HELD_OUT_PAIRS", 6)
    result = call("--list")
    assert result.exit_code == 1
    assert "other data" in result.output
    assert "held_out_pairs.jsonl" in result.output


def test_several_calls_share_the_work(made_up, monkeypatch):
    comparison, write = made_up
    monkeypatch.setattr(compare_work, "PAUSE", 0)
    resta = comparison.rows[0]["resta"]
    first = comparison.run("resta", next(iter(resta.settings)), 0)
    done = []
    other = first.claimed()
    assert other.__enter__()

    def on_run(run, split):
        done.append((run.setting, run.seed, split))
        write(run.row.name, run.setting, run.seed, split)
        if len(done) == 7:
            # The other call ends, and has measured what it was at.
            write("resta", first.setting, 0, "validation", refusals=0.9)
            other.__exit__(None, None, None)

    comparison.work_through("resta", keep=False, on_run=on_run)
    # Nothing was chosen before the other call had ended, and nothing was done twice.
    assert len(set(done)) == len(done)
    validated = [(setting, seed) for setting, seed, split in done if split == "validation"]
    expected = set(itertools.product(resta.settings, (0, 1))) - {(first.setting, 0)}
    assert set(validated) == expected
    assert done[7:] == [(first.setting, seed, "test") for seed in (0, 1, 2)]


def test_what_another_call_is_at_is_not_begun(tmp_path):
    lock = tmp_path / "folder" / ".lock"
    with claimed(lock) as ours:
        assert ours
        with claimed(lock) as again:
            assert not again
    with claimed(lock, wait=True) as ours:
        assert ours


def test_another_machine_goes_on_from_the_record(whole, data, tmp_path, monkeypatch):
    work, call = whole
    record = json.loads((work / "compare.json").read_text())
    monkeypatch.setattr(compare_runs, "evaluated", None)
    elsewhere = ["--work", tmp_path / "work", "--out", work]
    result = call("--list", *elsewhere)
    assert result.exit_code == 0, result.output
    assert f"{len(record['runs'])} runs are known from the record" in result.output
    assert "all: 0 steps left" in result.output
    result = call(*elsewhere)
    assert result.exit_code == 0, result.output
    assert json.loads((work / "compare.json").read_text()) == record
    # A run that would come about otherwise is not taken for the same.
    changed = {**record, "runs": [{**run, "key": "0" * 12} for run in record["runs"]]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text(json.dumps(changed))
    result = call("--list", "--work", tmp_path / "new", "--out", tmp_path / "out")
    assert "known from the record" not in result.output
    assert "all: 0 steps left" not in result.output


def test_models_that_came_out_otherwise_are_told(whole):
    work, _ = whole
    record = json.loads((work / "compare.json").read_text())
    assert "differ in their bits" not in markdown(record, None)
    run = next(run for run in record["runs"] if run["row"] == "somf")
    assert set(run["inputs"]) == {"aligned", "math", "code"}
    run["inputs"]["math"] = run["inputs"]["aligned"] = "0" * 12
    told = next(x for x in markdown(record, None).splitlines() if "differ in their bits" in x)
    assert told.endswith("aligned (2), math of seed 5 (2)") or told.endswith(
        "math of seed 5 (2), aligned (2)"
    )


def test_a_model_that_was_made_with_other_settings_is_refused(tmp_path):
    models = Models(tmp_path, None, "org/model", Trainings())
    folder = models.folder("math", 5)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    expected = models.training("math", 5)
    (folder / "training.json").write_text(json.dumps({"parent": "aligned", **expected}))
    assert models.made("math", 5, []) == folder
    (folder / "training.json").write_text(json.dumps({**expected, "steps": 2}))
    with pytest.raises(click.ClickException, match="math was made with other settings"):
        models.made("math", 5, [])


def test_a_failed_run_is_told_and_tried_again(whole, monkeypatch):
    _, call = whole
    asked = []

    def fails(task):
        asked.append(task)
        raise click.ClickException("no room")

    monkeypatch.setattr(compare_make, "in_a_process", fails)
    for _ in range(2):
        result = call("--only", "lox")
        assert result.exit_code == 1
        assert "2 runs failed" in result.output
    assert len(asked) == 4
    result = call("--only", "loxx")
    assert "no row is called loxx" in result.output


def test_dpo_trains_on_the_pairs_and_in_the_order_that_a_mask_learns_from(
    family, family_recipe, tmp_path, monkeypatch
):
    source = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(80))
    plans = []
    monkeypatch.setattr(compare_make, "dpo_seconds", lambda m, o, plan, *_: plans.append(plan))
    monkeypatch.setattr(compare_make, "save_whole", lambda *_: None)
    learning = {"batch_size": 4, "max_length": 48, "seed": 3, "max_steps": 30}
    compare_make._trained(
        family / "base", tmp_path / "dpo", source, learning | {"learning_rate": 1e-6}
    )
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


def test_more_pairs_are_those_that_nothing_learned_from(whole, data, tmp_path):
    work, _ = whole
    arguments = ["--work", work, "--data", data, "--model", work.parent / "model"]
    arguments += ["--seeds", "5,6", "--quick", "--out", tmp_path]
    result = CliRunner().invoke(compare_more.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    text = (tmp_path / "compare-more" / "evaluation.md").read_text()
    assert text in result.output
    assert str(work) not in (tmp_path / "compare-more" / "evaluation.json").read_text()
    found = json.loads((tmp_path / "compare-more" / "evaluation.json").read_text())
    names = list(found["models"])
    assert names[:3] == ["aligned base", "task_arithmetic, weight 0.5", "somf, defaults"]
    # At the rate that the comparison has chosen.
    record = json.loads((work / "compare.json").read_text())
    rate = next(e["setting"] for e in record["entries"] if e["row"] == "dpo_norm" and e["chosen"])
    assert names[3:] == [f"length-normalized safety DPO of the plain merge, {rate}"]
    sources = [model["source"] for model in found["models"].values()]
    assert sources == ["one model", *["2 models"] * 3]
    # Each prompt once, and none that the comparison asks for harm.
    assert found["sets"]["harmful"]["examples"] == 5
    # The mean over the seeds, and its distance to the base, of the values of each seed.
    values = [
        json.loads(line) for line in (work / "more" / "values.jsonl").read_text().splitlines()
    ]
    margins = {
        value["step"].removesuffix(": safety pairs"): value["value"]
        for value in values
        if value["step"].endswith(": safety pairs")
    }
    assert len(margins) == 7
    row = next(r for r in found["measures"] if r["measure"] == "preference margin")
    base = statistics.mean(margins["aligned base"])
    somf = statistics.mean(
        statistics.mean(margins[f"somf, defaults (seed {seed})"]) for seed in (5, 6)
    )
    assert row["models"]["somf, defaults"]["value"] == pytest.approx(somf)
    assert row["models"]["somf, defaults"]["difference"]["value"] == pytest.approx(somf - base)
    # What the base and each seed's mask learned from, by the package's own plan of a recipe.
    pairs, held_out = real_data.split_by_prompt(real_data.pairs_of(data), 12, real_data.SPLIT_SEED)
    training = QUICK.aligned
    aligned = alignment_examples(pairs, data, training.examples, training.seed)
    learned = {messages[-1]["content"] for messages, _ in aligned}
    for seed in (5, 6):
        making = comparison_rows(seed, QUICK_LEARNING)["somf"].settings["defaults"]
        names = Models(work, data, "", QUICK).names(seed)
        planned = planned_merge(
            read_recipe(compare_make._resolved(making.learns, names)), MergeOptions()
        )
        encoded = checked_data(planned).pairs
        for rows in batches(len(encoded), planned.settings, QUICK_LEARNING.steps):
            learned |= {pairs[encoded[row].row].messages[-1]["content"] for row in rows}
    left = [pair for pair in pairs if pair.messages[-1]["content"] not in learned]
    tested = read_splits(data, pairs, held_out, QUICK_SIZES)["test"].pairs
    assert 0 < len(left) < len(pairs)
    assert len(margins["aligned base"]) == found["sets"]["pairs"]["examples"]
    assert found["sets"]["pairs"]["examples"] == len(left) + len(tested)
