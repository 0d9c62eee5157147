"""The published hyper-parameters: what `preset: paper` sets, and what it leaves to the recipe."""

import re
from pathlib import Path

import pytest
import tiny
from mergekit.options import MergeOptions

from somf_mergekit import recipe
from somf_mergekit.planner import planned_merge
from somf_mergekit.recipe_check import read_recipe

PAGE = Path(__file__).parent.parent / "docs/recipe.md"
PAPER = {
    "granularity": "weight",
    "temperature": 0.5,
    "init_logit": 0.0,
    "mask_rescale": "mean",
    "objective": "dpo",
    "beta": 0.1,
    "reference": "redrawn",
    "learning_rate": 0.01,
    "batch_size": 16,
    "epochs": 1,
    "max_steps": 900,
}


@pytest.fixture
def planned(family):
    """The plan of a recipe over the family, as a function of its parameters."""

    def plan(**parameters):
        content = tiny.recipe(
            family / "base",
            [family / "math", family / "code"],
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
        (name, str(value), defaults[name]) for name, value in recipe.PRESETS["paper"].items()
    ]
