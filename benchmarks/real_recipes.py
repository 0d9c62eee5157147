"""Recipes for the stock `mergekit-yaml`, and running it on them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

# How the masks of the reported tables are learned, but for what each table varies.
LEARNING = {
    "granularity": "weight",
    "max_steps": 60,
    "batch_size": 8,
    "learning_rate": 0.1,
    "max_length": 128,
    "seed": 0,
}
NOTHING_LEARNED = {"granularity": "weight", "max_steps": 0, "seed": 0}
FINISHED = "finished_recipe.yml"
# Fusions as in arXiv 2405.09055: TIES keeps the top 20 % at 0.4, DARE drops 20 % at 0.3.
TIES = {"weight": 0.4, "density": 0.2, "normalize": False}
DARE = {"weight": 0.3, "density": 0.8}

Recipe = dict[str, Any]


def recipes(work: Path) -> dict[str, Recipe]:
    """Return all recipes by the name of the model they make, in the order they must run."""
    return {name: recipe for group in groups(work).values() for name, recipe in group.items()}


def groups(work: Path) -> dict[str, dict[str, Recipe]]:
    """Return the recipes of each table: the main one, and those that vary one thing of it."""
    data = {"safety_dataset": str(work / "safety_pairs.jsonl")}
    learned = {"mask": str(work / "somf_soft" / "somf")}

    def somf(**parameters: Any) -> Recipe:
        return _recipe(work, "somf", {"fusion": "task_arithmetic", **parameters})

    def learning(**changes: Any) -> Recipe:
        return somf(**{**data, **LEARNING, **changes})

    return {
        "main": {
            "task_arithmetic": _recipe(work, "task_arithmetic"),
            # A soft mask that learned nothing is task arithmetic: the control is a random draw.
            "untrained_sampled": somf(**data, **NOTHING_LEARNED, mask_kind="sampled"),
            "somf_soft": learning(mask_kind="soft"),
            "somf_binary": somf(**learned, mask_kind="binary"),
        },
        "fusions": {
            "dare": _recipe(work, "dare_linear", DARE),
            "somf_dare": learning(fusion="dare_linear", **DARE),
            "ties": _recipe(work, "ties", TIES),
            "somf_ties": learning(fusion="ties", **TIES),
        },
        "granularities": {
            "somf_row": learning(granularity="row"),
            "somf_column": learning(granularity="column"),
            "somf_head": learning(granularity="head"),
            # Divided by its mean, a mask of one entry is 1: it starts at 0.95 instead.
            "somf_tensor": learning(granularity="tensor", mask_rescale="none", init_logit=3.0),
        },
        "settings": {
            "somf_reference_base": learning(reference="base"),
            "somf_utility": learning(
                reference="base", utility_dataset=str(work / "harmless.jsonl")
            ),
            "somf_rate_0.01": learning(reference="base", learning_rate=0.01),
            "somf_rate_0.3": learning(reference="base", learning_rate=0.3),
            "somf_paper": somf(**data, preset="paper", max_length=128, seed=0),
        },
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


def _recipe(work: Path, method: str, parameters: dict[str, Any] | None = None) -> Recipe:
    shared = {"weight": 0.5, **(parameters or {})}
    weight = shared.pop("weight")
    recipe: Recipe = {
        "merge_method": method,
        "base_model": str(work / "aligned"),
        "models": [
            {"model": str(work / name), "parameters": {"weight": weight}}
            for name in ("math", "code")
        ],
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }
    return recipe | ({"parameters": shared} if shared else {})
