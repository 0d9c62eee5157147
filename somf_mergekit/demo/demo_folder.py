"""The demo's folder: when it may be used, its recipes and their merges, and its results."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import RecipeError
from ..common.requirements import versions
from .demo_models import DemoSettings
from .demo_table import Scores, markdown_table

# Written first, so that a broken-off demo's folder is known as one, too.
MARKER = "demo.json"
PAIRS = "safety_pairs.jsonl"
TABLE, RESULTS = "table.md", "results.json"

MERGES = {
    "task_arithmetic": "The plain merge of both specialists.",
    "somf_untrained": "The control: the same merge under a random mask that learned nothing.",
    "somf": "The same merge under a mask learned on the safety pairs.",
    "somf_composed": "The same merge under a mask for each specialist, each learned alone before.",
}
# Lines of a failed command's output that are worth showing.
SHOWN_LINES = 15
# Besides what --quiet silences: bars of mergekit's tokenizers and of datasets, and what
# transformers says of how mergekit calls it.
_SILENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare_folder(out_dir: Path, models: Sequence[str], settings: DemoSettings, seed: int) -> None:
    """Make the folder, or clear what an earlier demo left in it.

    Raises:
        RecipeError: it holds something that no demo wrote, or it can't be written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.iterdir()) and not (out_dir / MARKER).is_file():
            raise RecipeError(
                f"{out_dir} is not empty and no demo made it; name a new or an empty folder"
            )
        for name in models:
            shutil.rmtree(out_dir / name, ignore_errors=True)
        for name in (TABLE, RESULTS):
            (out_dir / name).unlink(missing_ok=True)
        _write_json({"seed": seed, "settings": asdict(settings)}, out_dir / MARKER)
    except OSError as error:
        raise RecipeError(f"{out_dir} can't be written: {error}") from error


def write_pairs(rows: Sequence[dict[str, str]], out_dir: Path) -> None:
    """Write the safety pairs, one JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out_dir / PAIRS).write_text("".join(lines), encoding="utf-8")


def write_results(
    rows: Sequence[Scores], out_dir: Path, settings: DemoSettings, seed: int, seconds: float
) -> None:
    """Write the table, and the same numbers with seed, settings and versions as JSON."""
    (out_dir / TABLE).write_text(markdown_table(rows), encoding="utf-8")
    results = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "held_out_prompts": settings.held_out,
        "versions": versions(),
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
    }
    _write_json(results, out_dir / RESULTS)


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def mask_folder(model: str) -> str:
    """Return the folder of the mask that is learned for one specialist alone."""
    return f"{os.path.basename(model)}-mask"


def demo_recipes(
    base: str, models: Sequence[str], pairs: str, settings: DemoSettings, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the recipes by name: the plain merge, somf, and somf under an untrained mask; then
    one for each specialist that learns its mask, and their merge under these.

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
    alone = {
        **trained,
        "mask_noise": "none",
        "learning_rate": settings.own_mask.learning_rate,
        "max_steps": settings.own_mask.steps,
    }
    composed = recipe("somf", base, models, settings.weight, {"fusion": "task_arithmetic"})
    for item in composed["models"]:
        item["parameters"]["mask"] = mask_folder(item["model"])
    return {
        "task_arithmetic": recipe("task_arithmetic", base, models, settings.weight, {}),
        "somf_untrained": recipe("somf", base, models, settings.weight, untrained),
        "somf": recipe("somf", base, models, settings.weight, trained),
        **{mask_folder(m): recipe("somf", base, [m], settings.weight, alone) for m in models},
        "somf_composed": composed,
    }


def run_command(command: str, folder: Path) -> str:
    """Run a command of mergekit's or of this package in ``folder``, off line.

    Args:
        command: its name and arguments, to which ``--quiet`` is added.
        folder: where it runs.

    Returns:
        What the command says to its user, such as a warning.

    Raises:
        RecipeError: the command is missing or fails; its last words are quoted.
    """
    name, *arguments = command.split()
    beside = os.path.dirname(sys.executable)
    program = shutil.which(name, path=beside) or shutil.which(name)
    if program is None:
        raise RecipeError(f"{name} is neither in {beside} nor on the PATH: install mergekit")
    done = subprocess.run(
        [program, *arguments, "--quiet"],
        cwd=folder,
        env=os.environ | _SILENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    said = done.stdout.strip()
    if done.returncode:
        words = "\n".join(said.splitlines()[-SHOWN_LINES:])
        raise RecipeError(
            f"{command} failed in {folder} with exit code {done.returncode}: "
            f"{words or 'it says nothing'}"
        )
    return said


def write_recipe(content: dict[str, Any], comment: str, path: Path) -> None:
    """Write a recipe that opens with what it does."""
    path.write_text(f"# {comment}\n{yaml.safe_dump(content, sort_keys=False)}", encoding="utf-8")
