"""The demo's folder: what stands in it, when it may be used, and its results."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..common.requirements import versions
from .demo_settings import DemoSettings
from .demo_table import Scores, markdown_table

# Written first, so that a broken-off demo's folder is known as one, too.
MARKER = "demo.json"
PAIRS = "safety_pairs.jsonl"
TABLE, RESULTS = "table.md", "results.json"


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
