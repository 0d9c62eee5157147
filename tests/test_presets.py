"""The published hyper-parameters: what `preset: paper` sets, and what it leaves to the recipe."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from somf_mergekit import MaskSet
from somf_mergekit.learner import loop
from somf_mergekit.mask import noise
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.recipe import presets
from somf_mergekit.recipe import settings as recipe
from somf_mergekit.recipe.validate import read_recipe

PAGE = Path(__file__).parent.parent / "docs/recipe.md"
PAPER = {
    "held_out_share": 0.0,
    "granularity": "weight",
    "mask_kind": "sampled",
    "temperature": 0.5,
    "mask_noise": "concrete",
    "init_logit": 0.0,
    "mask_rescale": "mean",
    "objective": "dpo",
    "beta": 0.1,
    "reference": "redrawn",
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "warmup": 0.0,
    "schedule_steps": 963,
    "batch_size": 16,
    "epochs": 3,
    "patience": "none",
    "max_steps": 300,
    "max_length": 1024,
}


@pytest.fixture
def planned(family):
    """The plan of a recipe over the family, as a function of its parameters."""

    def plan(models=("math", "code"), **parameters):
        content = tiny.recipe(
            family / "base",
            [family / model for model in models],
            safety_dataset=str(family / "pairs.jsonl"),
            **parameters,
        )
        return planned_merge(read_recipe(content), MergeOptions())

    return plan


def rates(merge):
    """The learning rate of each tensor, as the learner reads it."""
    return {weight.name: task.parameters["learning_rate"] for weight, task in merge.tensors}


def test_the_preset_sets_the_published_values_and_nothing_else(planned):
    plain, preset = planned(), planned(preset="paper")
    assert preset.settings.model_dump() == plain.settings.model_dump() | {"preset": "paper"} | PAPER
    assert set(rates(plain).values()) == {0.03}
    assert set(rates(preset).values()) == {0.01}


def test_what_the_recipe_sets_wins_over_the_preset(planned):
    own = {"learning_rate": 0.05, "batch_size": 4, "reference": "base", "init_logit": 3.0}
    found = planned(preset="paper", **own)
    assert found.settings.model_dump().items() >= (PAPER | own).items()
    assert set(rates(found).values()) == {0.05}


@pytest.mark.parametrize(
    ("models", "parameters", "steps", "sum_of_rates"),
    [
        (("math", "code"), {"fusion": "task_arithmetic"}, 300, 2.8),
        (("math", "code"), {"fusion": "ties", "density": 0.2}, 200, 1.9),
        (("math", "code"), {"fusion": "dare_linear", "density": 0.8}, 100, 1.0),
        (("math", "code"), {"fusion": "linear"}, 321, 2.9),
        (("math", "code"), {"fusion": "della_linear"}, 300, 2.8),
        (("math",), {"fusion": "task_arithmetic"}, 900, 2.4),
        (("math",), {"fusion": "dare_linear", "density": 0.8}, 900, 2.4),
    ],
)
def test_each_fusion_ends_where_the_authors_took_its_mask(
    planned, models, parameters, steps, sum_of_rates
):
    settings = planned(models, preset="paper", **parameters).settings
    assert loop.step_count(settings, 5135) == settings.max_steps == steps
    shares = [
        loop.learning_rate_multiplier(n, settings.schedule_steps, settings.warmup)
        for n in range(steps)
    ]
    assert settings.learning_rate * sum(shares) == pytest.approx(sum_of_rates, abs=0.05)
    own = planned(models, preset="paper", max_steps=7, learning_rate=0.5, **parameters).settings
    assert (own.max_steps, own.learning_rate) == (7, 0.5)


@pytest.mark.parametrize(
    ("objective", "beta"), [("dpo", 0.1), ("dpo_norm", 5.0), ("ipo", 0.1), ("hinge", 0.1)]
)
def test_another_objective_has_its_own_beta_under_the_preset(planned, objective, beta):
    assert planned(preset="paper", objective=objective).settings.beta == beta
    assert planned(preset="paper", objective=objective, beta=2.0).settings.beta == 2.0


def test_a_merge_by_the_preset_uses_one_draw_of_a_mask_learned_by_adamw(family, tmp_path):
    content = tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        safety_dataset=str(family / "pairs.jsonl"),
        preset="paper",
    )
    found = tiny.merged(content, tmp_path / "out")["lm_head.weight"]
    masks = MaskSet.open(tmp_path / "out/somf")
    reported = masks.provenance
    assert reported["settings"].items() >= (PAPER | {"preset": "paper"}).items()
    # 24 pairs, 16 a step, three times; none is held out.
    assert (reported["steps"], reported["dataset"]["pairs"], reported["held_out"]["pairs"]) == (
        6,
        24,
        0,
    )
    p = masks.probabilities("lm_head.weight")
    # Six steps of AdamW move a logit by 0.06 at most, or little more.
    assert 0.005 < (p - 0.5).abs().max() < 0.02
    key = noise.noise_key(seed=0, step=-1, name="lm_head.weight")
    u = noise.uniform_noise(key, p.numel()).view(p.shape)
    mask = torch.sigmoid((torch.logit(p) + torch.logit(u)) / 0.5)
    base, one, two = (
        tiny.tensors_of(family / n)["lm_head.weight"] for n in ("base", "math", "code")
    )
    expected = base + 0.5 * ((one - base) + (two - base)) * mask / mask.mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tensors_that_a_filter_leaves_out_get_the_presets_value(planned):
    found = rates(planned(preset="paper", learning_rate=[{"filter": "mlp", "value": 0.5}]))
    assert {name: 0.5 if "mlp" in name else 0.01 for name in found} == found
    found = rates(planned(preset="paper", learning_rate={"filter": "mlp", "value": 0.5}))
    assert {name: 0.5 if "mlp" in name else 0.01 for name in found} == found


def test_the_preset_keeps_a_filters_own_fallback(planned):
    values = [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]
    found = rates(planned(preset="paper", learning_rate=values))
    assert {name: 0.5 if "mlp" in name else 0.2 for name in found} == found


@pytest.mark.parametrize("preset", ["papers", "", 1, ["paper"]])
def test_an_unknown_preset_is_refused(family_recipe, tmp_path, preset):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe(preset=preset))
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "parameters.preset: " in result.output
    assert not (tmp_path / "out").exists()


def test_documentation_shows_the_preset_as_it_is():
    section = PAGE.read_text().split("## The published hyper-parameters", 1)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", section, re.M)
    defaults = {parameter.name: parameter.default_text for parameter in recipe.parameters()}
    assert rows == [
        (name, str(value), defaults[name]) for name, value in presets.PRESETS["paper"].items()
    ]
    ends = re.findall(r"^\| `(\w+)` \| (\d+) \| [\d.]+ \| [\d.]+ \|$", section, re.M)
    assert ends == [(name, str(steps)) for name, steps in presets.PAPER_STEPS.items()]
