"""Recipes for the stock `mergekit-yaml`, and running it on them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

# How the mask of the reported table is learned.
LEARNING = {"max_steps": 60, "batch_size": 8, "learning_rate": 0.1, "max_length": 128, "seed": 0}
NOTHING_LEARNED = {"max_steps": 0, "seed": 0}
FINISHED = "finished_recipe.yml"


def recipes(work: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes by the name of the model they make, in the order they must run."""
    data = {"safety_dataset": str(work / "safety_pairs.jsonl")}
    learned = {"mask": str(work / "somf_soft" / "somf")}
    return {
        "task_arithmetic": _recipe(work, "task_arithmetic"),
        "untrained_soft": _somf(work, **data, **NOTHING_LEARNED, mask_kind="soft"),
        "untrained_sampled": _somf(work, **data, **NOTHING_LEARNED, mask_kind="sampled"),
        "somf_soft": _somf(work, **data, **LEARNING, mask_kind="soft"),
        "somf_binary": _somf(work, **learned, mask_kind="binary"),
    }


def merge_with_mergekit(name: str, recipe: dict[str, Any], work: Path) -> None:
    """Write the recipe and run `mergekit-yaml` on it, unless its finished model is there.

    An interrupted merge is repeated in its folder, where a learned mask is used again.

    Raises:
        click.ClickException: mergekit-yaml fails.
    """
    out, file = work / name, work / "recipes" / f"{name}.yml"
    text = yaml.safe_dump(recipe, sort_keys=False)
    finished = out / FINISHED
    if finished.exists() and finished.read_text() == text:
        click.echo(f"{name}: there already")
        return
    finished.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    click.echo(f"{name}: mergekit-yaml recipes/{file.name}")
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(out)]
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise click.ClickException(f"mergekit-yaml ended with {ended.returncode} on {file}")
    finished.write_text(text)


def _somf(work: Path, **parameters: Any) -> dict[str, Any]:
    recipe = _recipe(work, "somf")
    recipe["parameters"] = {"fusion": "task_arithmetic", **parameters}
    return recipe


def _recipe(work: Path, method: str) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(work / "aligned"),
        "models": [
            {"model": str(work / name), "parameters": {"weight": 0.5}} for name in ("math", "code")
        ],
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }
