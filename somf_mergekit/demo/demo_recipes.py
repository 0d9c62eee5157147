"""The demo's recipes, and the stock ``mergekit-yaml`` that runs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import RecipeError
from .demo_settings import DemoSettings

MERGES = {
    "task_arithmetic": "The plain merge of both specialists.",
    "somf_untrained": "The control: the same merge under a random mask that learned nothing.",
    "somf": "The same merge under a mask learned on the safety pairs.",
}
# Lines of a failed command's output that are worth showing.
SHOWN_LINES = 15


def recipe(
    method: str, base: str, models: Sequence[str], weight: float, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Return a mergekit recipe in which every model has the same weight."""
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model, "parameters": {"weight": weight}} for model in models],
        **({"parameters": parameters} if parameters else {}),
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }


def demo_recipes(
    base: str, models: Sequence[str], pairs: str, settings: DemoSettings, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the recipes by name: the plain merge, somf, and somf under an untrained mask.

    A soft mask that was never trained is the same number everywhere, which the rescale turns
    into 1: it would be task arithmetic to the bit. The control is a random draw instead.
    """
    somf = {
        "safety_dataset": pairs,
        "fusion": "task_arithmetic",
        # So small a model has few rows: a mask of them costs it more of its skills.
        "granularity": "weight",
        "learning_rate": settings.mask.learning_rate,
        "batch_size": settings.mask_batch_size,
        "sft_weight": settings.mask_sft_weight,
        "reference": "base",
        "max_length": settings.max_length,
        "seed": seed,
    }
    trained = {**somf, "mask_kind": "soft", "max_steps": settings.mask.steps}
    untrained = {**somf, "mask_kind": "sampled", "max_steps": 0}
    return {
        "task_arithmetic": recipe("task_arithmetic", base, models, settings.weight, {}),
        "somf_untrained": recipe("somf", base, models, settings.weight, untrained),
        "somf": recipe("somf", base, models, settings.weight, trained),
    }


def run_mergekit_yaml(recipe_file: str, merged: str, folder: Path, *, quiet: bool) -> None:
    """Run ``mergekit-yaml recipe_file merged`` in ``folder``, off line.

    Raises:
        RecipeError: the command is missing or fails; its last words are quoted.
    """
    command = [_mergekit_yaml(), recipe_file, merged, *(["--quiet"] if quiet else [])]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        words = "\n".join((done.stdout or "").strip().splitlines()[-SHOWN_LINES:])
        raise RecipeError(
            f"mergekit-yaml {recipe_file} {merged} failed in {folder} "
            f"with exit code {done.returncode}{': ' if words else ''}{words}"
        )


def write_recipe(content: dict[str, Any], comment: str, path: Path) -> None:
    """Write a recipe that opens with what it does."""
    path.write_text(f"# {comment}\n{yaml.safe_dump(content, sort_keys=False)}", encoding="utf-8")


def _mergekit_yaml() -> str:
    beside = os.path.dirname(sys.executable)
    found = shutil.which("mergekit-yaml", path=beside) or shutil.which("mergekit-yaml")
    if found is None:
        raise RecipeError(f"mergekit-yaml is neither in {beside} nor on the PATH: install mergekit")
    return found
