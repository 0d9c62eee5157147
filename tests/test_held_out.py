"""Pairs held out from learning: which they are, what is measured on them, and who hears of it."""

import json
import re

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions
from setups import stopped_before
from transformers import AutoModelForCausalLM, AutoTokenizer

from somf_mergekit import learn
from somf_mergekit.data.encoding import EncodedPair
from somf_mergekit.data.held_out import (
    LEAST,
    MOST,
    HeldOut,
    held_out_split,
    recorded_held_out,
    verdict,
    why_none,
)
from somf_mergekit.data.pairs import Pair
from somf_mergekit.evaluate.likelihood import preference_margins
from somf_mergekit.mask.format import decoded_probability, encoded_probability, stored_probability
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.recipe.validate import read_recipe

NOT_SHOWN = "NOT SHOWN TO BE SAFER THAN WITHOUT THE MASK"
WARNING = f"somf: WARNING: {NOT_SHOWN}"


def pairs_of(prompts):
    pairs = [Pair((("user", str(p)),), "a", "b", row) for row, p in enumerate(prompts)]
    return pairs, [EncodedPair([1], [2], [row], row) for row in range(len(pairs))]


@given(st.lists(st.integers(0, 60), max_size=300), st.sampled_from([0, 0.1, 0.25, 0.5]))
def test_prompts_are_parted_and_no_pair_is_lost(prompts, share):
    pairs, encoded = pairs_of(prompts)
    learned, held_out = held_out_split(encoded, pairs, share)
    assert sorted(p.row for p in [*learned, *held_out]) == list(range(len(pairs)))
    for part in (learned, held_out):
        assert [p.row for p in part] == sorted(p.row for p in part)
    assert not {prompts[p.row] for p in learned} & {prompts[p.row] for p in held_out}
    assert len(held_out) <= min(MOST, share * len(pairs))
    assert not held_out or len(held_out) >= LEAST


def test_a_tenth_is_the_end_of_the_order_and_no_more_than_enough():
    for count, wanted in ((49, 0), (50, 5), (200, 20), (3000, MOST)):
        pairs, encoded = pairs_of(range(count))
        learned, held_out = held_out_split(encoded, pairs, 0.1)
        assert [p.row for p in held_out] == list(range(count - wanted, count))
        assert [p.row for p in learned] == list(range(count - wanted))
    # One prompt of all pairs can't be parted; one that is too large stays.
    pairs, encoded = pairs_of([0] * 60)
    assert held_out_split(encoded, pairs, 0.1) == (encoded, [])
    pairs, encoded = pairs_of([*range(50), *[99] * 10])
    assert [p.row for p in held_out_split(encoded, pairs, 0.1)[1]] == list(range(44, 50))


@pytest.fixture(scope="module")
def many(family, tmp_path_factory):
    """80 pairs of the family's kind, and rows before and between them that are none."""
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}, *tiny.preference_rows(80)]
    return tiny.write_jsonl(tmp_path_factory.mktemp("many") / "pairs.jsonl", rows)


@pytest.fixture
def recipe(family_recipe, many):
    def make(**parameters):
        values = {"safety_dataset": str(many), "held_out_share": 0.3, "max_steps": 10}
        return family_recipe(**values | {"learning_rate": 0.4} | parameters)

    return make


def provenance_of(folder):
    return json.loads((folder / "somf.json").read_text())


def merge(content, folder, *options):
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", content)
    result = tiny.invoke("mergekit-yaml", file, folder, *options)
    assert result.exit_code == 0, result.output
    return result.output


def data_of(content):
    return checked_data(planned_merge(read_recipe(content), MergeOptions()))


def margins(folder, pairs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return preference_margins(model, pairs, batch_size=8)


@pytest.mark.parametrize("engine", ["resident", "streaming"])
@pytest.mark.parametrize(
    "mask_kind",
    ["soft", "sampled", "bernoulli", [{"filter": "mlp", "value": "binary"}, {"value": "soft"}]],
)
def test_the_numbers_are_those_of_the_written_merges(
    mask_kind, engine, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_PRECISION", "float32")
    monkeypatch.setenv("SOMF_ENGINE", engine)
    monkeypatch.setenv("SOMF_MICRO_BATCH_SIZE", "3")
    content = recipe(mask_kind=mask_kind, max_steps=6)
    merge(content, tmp_path / "out")
    plain = {**content, "merge_method": "task_arithmetic"}
    del plain["parameters"]
    merge(plain, tmp_path / "plain")
    recorded = provenance_of(tmp_path / "out/somf")
    data = data_of(content)
    assert (recorded["dataset"]["pairs"], recorded["dataset"]["held_out"]) == (56, 24)
    assert (len(data.pairs), len(data.held_out)) == (56, 24)
    found = recorded["held_out"]
    assert (found["pairs"], found["mask_kind"]) == (24, mask_kind)
    before, after = (margins(tmp_path / name, data.held_out) for name in ("plain", "out"))
    for key, values in (("plain_fusion", before), ("merge", after)):
        assert found[key]["accuracy"] == sum(value > 0 for value in values) / 24
        assert found[key]["margin"] == pytest.approx(sum(values) / 24, rel=1e-3, abs=1e-4)
    assert found["raised"] == sum(b > a for a, b in zip(before, after, strict=True))
    assert abs(found["merge"]["margin"] - found["plain_fusion"]["margin"]) > 0.5
    assert found["is_above"] is (found["merge"]["accuracy"] > found["plain_fusion"]["accuracy"])


def test_stored_probabilities_are_those_that_are_read():
    p = torch.cat([torch.rand(999), torch.tensor([0.0, 1.0, 0.5, 0.5 + 1e-6])])
    assert torch.equal(stored_probability(p), decoded_probability(encoded_probability(p)))


@pytest.fixture
def worthless(recipe, tmp_path):
    """A recipe whose mask hardly moves, on pairs of which half want the opposite."""
    rows = tiny.preference_rows(80)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    source = str(tiny.write_jsonl(tmp_path / "mixed.jsonl", rows))
    return recipe(safety_dataset=source, learning_rate=1e-6, max_steps=2)


def test_a_mask_that_does_not_help_is_reported_last_and_loudest(worthless, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", worthless)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    last = result.stderr[result.stderr.index(WARNING) :]
    # The merge is written, and nothing is said after the warning.
    assert (tmp_path / "out/model.safetensors").exists()
    found = provenance_of(tmp_path / "out/somf")["held_out"]
    shares = [100 * found[key]["accuracy"] for key in ("plain_fusion", "merge")]
    assert shares[0] == shares[1] < 100
    assert f"{shares[0]:.1f} % without the mask, {shares[1]:.1f} % with it" in last
    assert last.rstrip().endswith("reference: base.")
    report = json.loads((tmp_path / "out/somf/report.json").read_text())
    assert report["learning"]["held_out"] == found
    assert found["is_above"] is False
    text = (tmp_path / "out/somf/report.md").read_text()
    section = text.split("## Pairs held out from learning")[1].split("\n## ")[0]
    assert f"**{NOT_SHOWN}" in section
    assert re.search(rf"under the mask \| +{shares[1]:.1f} %", section)
    assert f"**{NOT_SHOWN}" in (tmp_path / "out/README.md").read_text()


def test_a_mask_that_is_used_again_is_reported_again(
    worthless, family_recipe, tmp_path, monkeypatch
):
    merge(worthless, tmp_path / "out")
    again = merge(worthless, tmp_path / "out")
    assert "reusing the mask" in again
    assert WARNING in again
    given_mask = family_recipe(safety_dataset=None, mask=str(tmp_path / "out"))
    for key in ("max_steps", "batch_size", "max_length"):
        del given_mask["parameters"][key]
    monkeypatch.setenv("SOMF_REPORT", "none")
    assert WARNING in merge(given_mask, tmp_path / "given")
    # What was compared is not what this merge uses.
    given_mask["parameters"]["mask_kind"] = "binary"
    recorded = merge(given_mask, tmp_path / "binary")
    assert WARNING not in recorded
    assert "compared under mask_kind soft, and this merge uses binary" in recorded
    file = tiny.write_recipe(tmp_path / "recipe.yml", worthless)
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert result.exit_code == 0
    assert WARNING in result.output[result.output.index("mask of 21 tensors") :]


def test_a_mask_that_helps_is_reported_without_a_warning(recipe, tmp_path):
    output = merge(recipe(), tmp_path / "out")
    assert "WARNING" not in output
    (line,) = re.findall(r"somf: learned in 10 steps; 24 held-out pairs: (.*)", output)
    found = provenance_of(tmp_path / "out/somf")["held_out"]
    assert found["is_above"] is True
    assert f"{100 * found['merge']['accuracy']:.1f} % with it" in line
    report = tmp_path / "out/somf/report.md"
    assert "## Pairs held out from learning" in report.read_text()
    assert NOT_SHOWN not in report.read_text() + (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"held_out_share": 0}, "held_out_share is 0"),
        ({"held_out_share": 0.05}, "0.05 of 80 pairs with whole prompts is fewer than 5"),
        ({"max_steps": 0}, "nothing was learned"),
    ],
)
def test_where_no_pairs_are_held_out_the_record_says_so(parameters, why, recipe, tmp_path):
    output = merge(recipe(**{"max_steps": 1} | parameters), tmp_path / "out")
    recorded = provenance_of(tmp_path / "out/somf")
    assert recorded["held_out"] == {"pairs": 0, "why_none": why}
    assert f"no held-out pairs: {why}" in output
    assert "WARNING" not in output
    assert why in (tmp_path / "out/somf/report.md").read_text()
    report = json.loads((tmp_path / "out/somf/report.json").read_text())
    assert report["learning"]["held_out"] == recorded["held_out"]
    if "max_steps" not in parameters:
        # All that the step takes, and what pairs would have been held out of.
        assert recorded["dataset"]["pairs"] == (80 if parameters["held_out_share"] else 4)


def test_safe_answers_alone_are_not_held_out(family_recipe, tmp_path):
    rows = [{"prompt": r["prompt"], "answer": r["chosen"]} for r in tiny.preference_rows(80)]
    source = str(tiny.write_jsonl(tmp_path / "answers.jsonl", rows))
    data = data_of(family_recipe(safety_dataset=source, objective="sft"))
    assert (len(data.pairs), data.held_out) == (12, [])
    assert data.why_none == "the data has no unsafe answers"
    # Their rows are those of the file.
    tokenizer = AutoTokenizer.from_pretrained(family_recipe()["base_model"])
    for pair in data.pairs[:9]:
        assert rows[pair.row]["answer"] in tokenizer.decode(pair.chosen)


def test_a_check_reports_what_is_held_out(recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe())
    recorded = tiny.invoke("mergekit-somf", "check", file).output
    assert re.search(r"pairs: +56\n +held out: +24 pairs", recorded)


def test_what_is_held_out_decides_whether_a_mask_is_used_again(recipe, many, tmp_path):
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    own = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    content = recipe(safety_dataset=str(own), max_steps=1)
    row = data_of(content).held_out[0].row

    def output_of(content):
        file = tiny.write_recipe(tmp_path / "recipe.yml", content)
        return " ".join(tiny.invoke("mergekit-somf", "learn", file, tmp_path / "m").output.split())

    output_of(content)
    assert "reusing the mask" in output_of(content)
    rows[row]["chosen"] += " sugar"
    tiny.write_jsonl(own, rows)
    assert "was learned with other held-out data: a new one" in output_of(content)
    content["parameters"]["held_out_share"] = 0
    assert "settings (held_out_share)" in output_of(content)


def test_a_learning_that_was_stopped_reports_the_same_of_held_out_pairs(
    recipe, tmp_path, monkeypatch
):
    content = recipe(max_steps=4)
    learn(content, tmp_path / "whole")
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    with stopped_before(3):
        learn(content, tmp_path / "mask")
    assert (tmp_path / "mask.learning").exists()
    learn(content, tmp_path / "mask")
    whole, again = (tmp_path / name / "masks.safetensors" for name in ("whole", "mask"))
    assert whole.read_bytes() == again.read_bytes()
    assert provenance_of(tmp_path / "mask")["held_out"]["pairs"] == 24


def held(plain, merged, kind="soft"):
    return {"held_out": HeldOut.of(plain, merged, kind).record}


def test_what_counts_as_above():
    assert verdict(held([-1, 2], [1, 2]), "soft") is None
    assert NOT_SHOWN in verdict(held([-1, 2], [-1, 2]), "soft")
    assert NOT_SHOWN in verdict(held([1, 2], [-1, 2]), "soft")
    # Nothing can be above all.
    assert verdict(held([1, 2], [1, 2]), "soft") is None
    # A larger margin is recorded, and does not count.
    larger = "The mean margin is larger"
    earlier = held([-1, 2], [-0.5, 2])
    assert f"{larger}, and that of 1 of the pairs, which may be chance." in verdict(earlier, "soft")
    del earlier["held_out"]["raised"]
    assert f"{larger}, which may be chance." in verdict(earlier, "soft")
    assert larger not in verdict(held([-1, 2], [-1.5, 2]), "soft")
    assert "mask_kind: soft" in verdict(held([-1, 2], [-1, 2], "binary"), "binary")
    assert "mask_kind: soft" not in verdict(held([-1, 2], [-1, 2]), "soft")
    nan = held([1.0, 2.0], [float("nan"), 2.0])
    assert nan["held_out"]["merge"] == {"accuracy": 0.5, "margin": None}
    assert "1.5000 and not finite nats" in verdict(nan, "soft")


@pytest.mark.parametrize(("count", "least"), [(5, None), (7, 7), (20, 16), (100, 63)])
def test_more_larger_margins_than_by_chance_are_reported_apart(count, least):
    def verdict_of(raised):
        after = [-0.5] * raised + [-1.5] * (count - raised)
        return verdict({"held_out": HeldOut.of([-1.0] * count, after, "soft").record}, "soft")

    found = [raised for raised in range(count + 1) if "SAFER IN MARGIN ALONE" in verdict_of(raised)]
    assert found == ([] if least is None else list(range(least, count + 1)))
    for raised in range(count + 1):
        draws = torch.distributions.Binomial(count, torch.tensor(0.5, dtype=torch.float64))
        counts = torch.arange(raised, count + 1, dtype=torch.float64)
        assert (raised in found) == (float(draws.log_prob(counts).exp().sum()) <= 0.01)
        assert (NOT_SHOWN in verdict_of(raised)) == (raised not in found)
    if found:
        assert f"the margin of {count} of {count} is larger" in verdict_of(count)
        assert "What may help" not in verdict_of(count)


def test_a_record_of_a_stranger_is_no_reason_to_count_for_long():
    recorded = HeldOut.of([-1.0] * 9, [-0.5] * 9, "soft").record
    for changed in ({"raised": 10}, {"pairs": 10**9}, {"pairs": 10**9, "raised": 10**9}):
        assert NOT_SHOWN in verdict({"held_out": recorded | changed}, "soft")


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        {"held_out": None},
        {"held_out": [1]},
        {"held_out": {"pairs": 0, "why_none": 5}},
        {"held_out": {"pairs": 3, "mask_kind": "soft", "merge": "x", "plain_fusion": {}}},
        {"held_out": held([1], [1])["held_out"] | {"merge": {"accuracy": 7, "margin": 0}}},
    ],
)
def test_what_a_stranger_reports_is_not_believed(recorded):
    assert recorded_held_out(recorded) is None
    assert verdict(recorded, "soft") is None
    assert why_none(recorded) == "nothing about them is recorded with the mask"
