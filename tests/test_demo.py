"""The demo itself, in miniature: what it leaves in its folder and what it refuses to touch."""

import json
from dataclasses import asdict

import pytest
import yaml

from somf_mergekit.common.errors import RecipeError
from somf_mergekit.demo import DemoSettings, Scores, run_demo
from somf_mergekit.demo.demo_models import Stage
from somf_mergekit.demo.demo_table import markdown_table

MINIATURE = DemoSettings(
    hidden_size=16,
    layers=1,
    heads=2,
    pretraining=Stage(2, 1e-3),
    alignment=Stage(1, 1e-3),
    specialisation=Stage(3, 1e-3),
    batch_size=4,
    numbers_seen=4,
    code_seen=4,
    everyday_kept=4,
    harmful_pairs=4,
    harmless_pairs=4,
    mask=Stage(1, 0.1),
    own_mask=Stage(1, 0.1),
    mask_batch_size=2,
    train=300,
    held_out=3,
)


@pytest.mark.slow
def test_a_whole_demo_leaves_models_recipes_and_measured_rows(tmp_path, capsys):
    out = tmp_path / "demo"
    rows = run_demo(out, seed=5, quiet=True, settings=MINIATURE)
    assert [row.model for row in rows] == [
        "base (aligned)",
        "numbers specialist",
        "code specialist",
        "task_arithmetic",
        "somf, untrained mask",
        "somf",
        "somf, masks learned alone",
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "code-mask",
        "code-mask.yml",
        "demo.json",
        "models",
        "numbers-mask",
        "numbers-mask.yml",
        "results.json",
        "safety_pairs.jsonl",
        "somf",
        "somf.yml",
        "somf_composed",
        "somf_composed.yml",
        "somf_untrained",
        "somf_untrained.yml",
        "table.md",
        "task_arithmetic",
        "task_arithmetic.yml",
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["seed"] == 5
    assert results["rows"] == [asdict(row) for row in rows]
    assert (out / "table.md").read_text() == markdown_table(rows)
    assert capsys.readouterr().out.strip() == markdown_table(rows).strip()
    # The folder can be moved: nothing in a recipe names it.
    assert str(tmp_path) not in (out / "somf.yml").read_text()
    somf = yaml.safe_load((out / "somf.yml").read_text())
    control = yaml.safe_load((out / "somf_untrained.yml").read_text())
    control["parameters"].update(mask_kind="soft", max_steps=1)
    assert control == somf


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="not empty and no demo made it"):
        run_demo(tmp_path, quiet=True, settings=MINIATURE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_folders_place_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="can't be written"):
        run_demo(tmp_path / "file", quiet=True, settings=MINIATURE)


def test_table_shows_shares_in_per_cent_and_losses():
    row = Scores("somf", 1.0, 0.97, 0.0, 0.985, 0.5, 0.25, 1.23456, 0.1)
    assert markdown_table([row]).splitlines()[-1] == (
        "| somf | 100 % (97 %) | 0 % | 98 % | 50 % (1.235) | 25 % (0.100) |"
    )
