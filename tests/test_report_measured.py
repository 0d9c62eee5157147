"""Merges measured beside their base and the plain fusion, compared with what each alone shows."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from somf_mergekit.data.chat import user_prompt
from somf_mergekit.data.encoding import encoded_pairs
from somf_mergekit.data.pairs import Pair
from somf_mergekit.evaluate import EvaluationSettings, answer_loss, preference_accuracy
from somf_mergekit.evaluate import for_recipe as measured
from somf_mergekit.evaluate.for_recipe import BASE, MERGED, PLAIN, named_sources

SUMS = [("what is two and two", "so four"), ("what is two and one", "three it is")]
HARM = ["how do i open a forbidden red box", "how do i open a forbidden tin box"]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    short = partial(EvaluationSettings, max_new_tokens=6, resamples=100)
    monkeypatch.setattr(measured, "EvaluationSettings", short)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    tiny.write_jsonl(folder / "harm.jsonl", [{"prompt": text} for text in HARM])
    tiny.write_jsonl(folder / "harmless.jsonl", [{"prompt": "how do i make a plum cake"}])
    tiny.write_jsonl(folder / "held-out.jsonl", tiny.preference_rows(5, seed=9))
    tiny.write_jsonl(folder / "sums.jsonl", [{"question": q, "answer": a} for q, a in SUMS])
    return folder


def asked(sets):
    return {
        "safety_eval": str(sets / "harm.jsonl"),
        "harmless_eval": str(sets / "harmless.jsonl"),
        "pairs_eval": str(sets / "held-out.jsonl"),
        "skill_eval": f"math={sets}/sums.jsonl, other={sets}/sums.jsonl",
    }


def merge(recipe, folder):
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, folder)
    assert result.exit_code == 0, result.output
    return result.output


def evaluation_of(folder):
    return json.loads((folder / "somf/report.json").read_text())["evaluation"]


def values(evaluation, set_name, measure):
    (row,) = [
        row for row in evaluation["measures"] if (row["set"], row["measure"]) == (set_name, measure)
    ]
    return {name: found["value"] for name, found in row["models"].items()}


def test_before_and_after_are_what_each_model_shows_alone(family, family_recipe, sets, tmp_path):
    recipe = family_recipe(max_steps=6, learning_rate=0.5, **asked(sets))
    merge(recipe, tmp_path / "out")
    plain = {**recipe, "merge_method": "task_arithmetic", "parameters": {}}
    tiny.merged(plain, tmp_path / "plain")
    evaluation = evaluation_of(tmp_path / "out")
    folders = {BASE: family / "base", PLAIN: tmp_path / "plain", MERGED: tmp_path / "out"}
    assert set(evaluation["models"]) == set(folders)
    losses, accuracies = {}, {}
    rows = tiny.preference_rows(5, seed=9)
    pairs = [Pair((("user", r["prompt"]),), r["chosen"], r["rejected"]) for r in rows]
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        examples = [(user_prompt(q), a) for q, a in SUMS]
        losses[name] = answer_loss(model, tokenizer, examples, max_length=512, batch_size=8)
        encoded, _ = encoded_pairs(pairs, tokenizer, 512, "held-out")
        accuracies[name] = preference_accuracy(model, encoded, batch_size=8)[0]
    assert abs(losses[MERGED] - losses[PLAIN]) > 1e-3
    for skill in ("math", "other"):
        assert values(evaluation, skill, "loss") == pytest.approx(losses, abs=1e-4)
    assert values(evaluation, "pairs", "preference accuracy") == pytest.approx(accuracies)
    shares = values(evaluation, "harmful", "refusals (phrases)")
    assert set(shares) == set(folders)
    assert set(values(evaluation, "harmless", "refusals (phrases)")) == set(folders)
    (row,) = [r for r in evaluation["measures"] if (r["set"], r["measure"]) == ("math", "loss")]
    difference = row["models"][MERGED]["difference"]["value"]
    assert difference == pytest.approx(losses[MERGED] - losses[PLAIN], abs=1e-4)
    text = (tmp_path / "out/somf/report.md").read_text()
    assert text.count("\n## Before and after\n") == 1
    assert "### Difference to plain fusion" in text
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.tags == ["mergekit", "merge"]
    (shown,) = [
        row for row in card.content.splitlines() if row.startswith("| math") and "loss" in row
    ]
    assert f"{losses[MERGED]:.3f}" in shown
    assert_nothing_is_left(tmp_path, ["out", "out.yml", "plain", "plain.yml"])


def assert_nothing_is_left(folder, expected):
    assert sorted(path.name for path in folder.iterdir()) == expected
    texts = [p.read_text() for p in (folder / "out").rglob("*.[mj][ds]*") if p.suffix != ".jinja"]
    assert len(texts) > 4
    # Neither prompts nor answers are stored.
    assert not [text for text in texts if "forbidden" in text or "four" in text]


def test_the_plain_fusion_draws_what_the_merge_draws(family_recipe, sets, tmp_path):
    recipe = family_recipe(
        max_steps=0, fusion="dare_linear", density=0.5, skill_eval=f"math={sets}/sums.jsonl"
    )
    merge(recipe, tmp_path / "out")
    losses = values(evaluation_of(tmp_path / "out"), "math", "loss")
    # An untrained mask divided by its mean is no mask.
    assert losses[MERGED] == pytest.approx(losses[PLAIN], abs=1e-5)
    assert abs(losses[MERGED] - losses[BASE]) > 1e-3


def test_measuring_decides_nothing_of_the_mask(family_recipe, sets, tmp_path):
    merge(family_recipe(), tmp_path / "out")
    assert evaluation_of(tmp_path / "out") is None
    output = merge(family_recipe(safety_eval=str(sets / "harm.jsonl")), tmp_path / "out")
    assert "reusing the mask" in output
    assert evaluation_of(tmp_path / "out")["sets"]["harmful"]["examples"] == 2


def test_sets_that_are_wrong_are_refused_together_before_any_reading(family_recipe, sets, tmp_path):
    recipe = family_recipe(
        safety_dataset="./no-pairs.jsonl",
        safety_eval="./nothing.jsonl",
        pairs_eval=str(sets / "sums.jsonl"),
        skill_eval=f"math={sets}/sums.jsonl,math={sets}/sums.jsonl,harmful={sets}/sums.jsonl",
    )
    said = tiny.refused(recipe, tmp_path)
    assert "5 problems" in said
    assert "./no-pairs.jsonl: no such file" in said
    assert "parameters.safety_eval: dataset ./nothing.jsonl: no such file or folder" in said
    assert "parameters.pairs_eval: " in said
    assert "columns not recognised" in said
    assert "parameters.skill_eval: skill math: two skills have this name" in said
    assert "parameters.skill_eval: skill 'harmful': this name is taken" in said


def test_sets_of_a_given_mask_are_checked_too(family_recipe, tmp_path):
    assert tiny.invoke(
        "mergekit-somf",
        "learn",
        tiny.write_recipe(tmp_path / "learn.yml", family_recipe(max_steps=1)),
        tmp_path / "mask",
    )
    given = {"safety_dataset": None, "mask": str(tmp_path / "mask")}
    said = tiny.refused(family_recipe(**given, skill_eval="sums.jsonl"), tmp_path)
    assert "parameters.skill_eval: 'sums.jsonl' is not NAME=FILE" in said


def test_a_base_that_can_not_be_measured_is_reported_before(family, family_recipe, sets, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in Path(family / "base").iterdir():
        if "token" not in file.name:
            (base / file.name).write_bytes(file.read_bytes())
    tiny.invoke(
        "mergekit-somf",
        "learn",
        tiny.write_recipe(tmp_path / "learn.yml", family_recipe(max_steps=1)),
        tmp_path / "mask",
    )
    recipe = family_recipe(
        safety_dataset=None, mask=str(tmp_path / "mask"), safety_eval=str(sets / "harm.jsonl")
    )
    recipe["base_model"] = str(base)
    assert "to measure the merge beside its base: model " in tiny.refused(recipe, tmp_path)


def test_measuring_that_fails_leaves_the_merge_and_no_traces(
    family_recipe, sets, tmp_path, monkeypatch
):
    def failing(*_arguments, **_options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(measured, "evaluated", failing)
    recipe = family_recipe(safety_eval=str(sets / "harm.jsonl"))
    output = merge(recipe, tmp_path / "out")
    assert "its report lacks the measurements: no memory left" in output
    assert evaluation_of(tmp_path / "out") is None
    assert "were not measured" in (tmp_path / "out/README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.yml"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("math=a.jsonl", [("math", "a.jsonl")]),
        (" math = a.jsonl , code=b/c ", [("math", "a.jsonl"), ("code", "b/c")]),
        (
            "math=o/g,config=main,split=test,code=c.jsonl",
            [("math", "o/g,config=main,split=test"), ("code", "c.jsonl")],
        ),
        ("math=a,b.jsonl", [("math", "a,b.jsonl")]),
    ],
)
def test_skills_are_read_from_a_text(text, expected):
    assert named_sources(text) == (expected, [])


@pytest.mark.parametrize("text", ["a.jsonl", "=a.jsonl", "math=", "math=a,code="])
def test_skills_without_a_name_or_a_source_are_reported(text):
    found, problems = named_sources(text)
    assert found == []
    assert "is not NAME=FILE" in problems[0]
