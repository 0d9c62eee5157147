"""Losses against their formulas, and the data that each objective takes."""

import json
import math
from itertools import combinations

import pytest
import tiny
import torch

from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.data import encoding
from somf_mergekit.data import pairs as answers
from somf_mergekit.data.chat import user_prompt
from somf_mergekit.learner import objectives


@pytest.mark.parametrize(
    ("objective", "formula"),
    [
        ("dpo", lambda h: math.log(1 + math.exp(-0.3 * h))),
        ("dpo_norm", lambda h: math.log(1 + math.exp(-0.3 * h))),
        ("ipo", lambda h: (h - 1 / 0.6) ** 2),
        ("hinge", lambda h: max(0.0, 1 - 0.3 * h)),
    ],
)
def test_preference_losses(objective, formula):
    ratios = [-4.0, -0.1, 0.0, 1.7, 20.0]
    losses, margins = objectives.preference_losses(objective, torch.tensor(ratios), 0.3)
    assert losses.tolist() == pytest.approx([formula(h) for h in ratios], rel=1e-5)
    assert margins.tolist() == pytest.approx([0.3 * h for h in ratios])
    with pytest.raises(ValueError, match="expected one of dpo, dpo_norm, ipo, hinge"):
        objectives.preference_losses("other", torch.zeros(1), 0.3)


def test_sft_loss_and_divergence():
    found = objectives.sft_losses(torch.tensor([-6.0, -1.0]), torch.tensor([3, 2]))
    assert found.tolist() == [2.0, 0.5]
    apart = objectives.divergences(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -5.0]))
    assert apart.tolist() == [0.0, 4.5]


def test_the_divergence_estimates_the_kl_on_tokens_that_the_unmasked_merge_draws():
    draw = torch.Generator().manual_seed(0)
    unmasked = torch.log_softmax(torch.randn(20, generator=draw), dim=0)
    masked = torch.log_softmax(unmasked + 0.05 * torch.randn(20, generator=draw), dim=0)
    expected = (unmasked.exp() * objectives.divergences(masked, unmasked)).sum()
    kl = (unmasked.exp() * (unmasked - masked)).sum()
    assert expected.item() == pytest.approx(kl.item(), rel=0.05)


EXPECTED = (user_prompt("how?"), "so")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "how?", "response": "so"},
        {"prompt": "how?", "response": "so", "is_safe": True, "category": "x"},
        {"prompt": "how?", "answer": "so"},
        {"prompt": "how?", "completion": "so"},
        {"prompt": "how?", "chosen": "so"},
        {"question": "how?", "answer": "so"},
        {"instruction": "how?", "output": "so"},
        {"instruction": "how?", "input": "", "output": "so"},
        {"prompt": [{"role": "user", "content": "how?"}], "response": "so"},
        {
            "messages": [
                {"role": "user", "content": "how?"},
                {"role": "assistant", "content": "so"},
            ]
        },
    ],
    ids=lambda row: "+".join(row),
)
def test_prompts_with_answers_are_recognised(row):
    found = answers.answered_prompts(tiny.dataset(row), "data")
    assert list(found) == [EXPECTED]
    assert found.unused == [name for name in row if name == "category"]


def test_context_follows_the_instruction():
    row = {"instruction": "add", "input": "1 and 2", "output": "3"}
    (found,) = answers.answered_prompts(tiny.dataset(row), "data")
    assert found == (user_prompt("add\n1 and 2"), "3")


def test_rows_without_a_safe_answer_are_dropped_and_counted():
    found = answers.answered_prompts(
        tiny.dataset(
            {"prompt": "how?", "response": "so", "is_safe": True},
            {"prompt": "how?", "response": "bad", "is_safe": False},
            {"prompt": "how?", "response": " ", "is_safe": True},
            {"prompt": "", "response": "so", "is_safe": True},
        ),
        "data",
    )
    assert list(found) == [EXPECTED]
    assert found.left_out.reasons == {
        "not safe": 1,
        "without an answer": 1,
        "without a prompt": 1,
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": "how?"},
            "answers not found. Found: text. Expected a prompt ('prompt'",
        ),
        ({"prompt": "how?", "response": ""}, "no prompt with an answer: 1 without an answer"),
    ],
)
def test_data_without_answers(row, said):
    with pytest.raises(RecipeError) as error:
        answers.answered_prompts(tiny.dataset(row), "data")
    assert said in error.value.message


def test_answers_without_a_token_are_refused():
    class Blind:
        chat_template = bos_token_id = eos_token_id = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": []}

    pair = answers.Pair((("user", "how?"),), "so", "")
    with pytest.raises(RecipeError, match="1 without an answer after token"):
        encoding.encoded_pairs([pair], Blind(), 32, "data")


def test_utility_rows_without_room_for_their_question_are_counted(family_recipe, tmp_path):
    long_head = [{"role": "system", "content": "safe " * 60}, *EXPECTED[0]]
    rows = [{"messages": [*EXPECTED[0], {"role": "assistant", "content": "sugar"}]}] * 3
    rows += [{"messages": [*long_head, {"role": "assistant", "content": "sugar"}]}] * 2
    utility = tiny.write_jsonl(tmp_path / "utility.jsonl", rows)
    file = tiny.write_recipe(tmp_path / "r.yml", family_recipe(utility_dataset=str(utility)))
    checked = tiny.invoke("mergekit-somf", "check", file)
    assert checked.exit_code == 0, checked.output
    assert "rows of the utility dataset left out: 2 whose last question has no" in checked.output


def merged(recipe, folder):
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, folder)
    assert result.exit_code == 0, result.output
    history = (folder / "somf/training.jsonl").read_text().splitlines()
    return MaskSet.open(folder), [json.loads(row) for row in history]


@pytest.mark.parametrize("objective", ["dpo", "dpo_norm", "ipo", "hinge", "sft"])
def test_whole_merges(family_recipe, tmp_path, objective):
    masks, history = merged(family_recipe(objective=objective), tmp_path / "out")
    settings = masks.provenance["settings"]
    assert settings["objective"] == objective
    assert settings["beta"] == (5 if objective == "dpo_norm" else 0.1)
    assert all(row["loss"] > 0 for row in history)
    assert all((row["accuracy"] is None) == (objective == "sft") for row in history)
    assert (masks.entries("lm_head.weight") - 0.5).abs().max() > 0.02


def test_references_lead_to_masks_of_their_own(family_recipe, tmp_path):
    heads = [
        merged(family_recipe(reference=name, beta=1.0), tmp_path / name)[0].entries(
            "lm_head.weight"
        )
        for name in ("base", "merged", "redrawn")
    ]
    assert not any(torch.equal(one, other) for one, other in combinations(heads, 2))


def test_safe_answers_alone_are_enough_for_sft(family_recipe, tmp_path):
    data = [
        {"prompt": r["prompt"], "response": r[kind], "is_safe": kind == "chosen"}
        for r in tiny.preference_rows(8)
        for kind in ("chosen", "rejected")
    ]
    tiny.write_jsonl(tmp_path / "labelled.jsonl", data)
    source = str(tmp_path / "labelled.jsonl")
    masks, history = merged(
        family_recipe(objective="sft", safety_dataset=source, seed=2), tmp_path / "out"
    )
    assert masks.provenance["dataset"]["pairs"] == 8
    assert masks.provenance["dataset"]["left_out"] == "8 not safe"
    # The safe answers of the pairs they came from are the same data.
    tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(8))
    _, same = merged(
        family_recipe(objective="sft", safety_dataset=str(tmp_path / "pairs.jsonl"), seed=2),
        tmp_path / "pairs",
    )
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in same], abs=1e-6)


def test_a_utility_term_is_learned_reported_and_part_of_the_fingerprint(family_recipe, tmp_path):
    harmless = [{"prompt": f"mix {w}", "response": f"flour with {w}"} for w in tiny.WORDS[:10]]
    tiny.write_jsonl(tmp_path / "harmless.jsonl", harmless)
    utility = {"utility_dataset": str(tmp_path / "harmless.jsonl"), "utility_samples": 6}
    masks, history = merged(family_recipe(**utility), tmp_path / "out")
    reported = masks.provenance["utility_dataset"]
    assert reported["examples"] == 6
    assert "flour" not in json.dumps(masks.provenance)
    assert all(row["utility"] > 0 for row in history)
    plain, without = merged(family_recipe(), tmp_path / "plain")
    assert all(row["utility"] is None for row in without)
    assert not torch.equal(masks.entries("lm_head.weight"), plain.entries("lm_head.weight"))
    tiny.write_jsonl(tmp_path / "harmless.jsonl", harmless[:5])
    file = tmp_path / "out.yml"
    again = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert "learned with other utility data" in again.output


def test_utility_data_without_answers_is_reported_with_what_else_is_wrong(family_recipe, tmp_path):
    tiny.write_jsonl(tmp_path / "harmless.jsonl", [{"prompt": "mix flour"}])
    recipe = family_recipe(
        utility_dataset=str(tmp_path / "harmless.jsonl"), safety_dataset="./nothing.jsonl"
    )
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    message = " ".join(result.output.split())
    assert "parameters.utility_dataset: dataset" in message
    assert "prompts with answers not found. Found: prompt." in message
    assert "./nothing.jsonl: no such file or folder" in message
