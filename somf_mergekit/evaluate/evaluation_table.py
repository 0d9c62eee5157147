"""An evaluation as a table to read and as JSON to go on with."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.console import aligned_table
from ..common.files import write_whole
from ..common.requirements import versions
from .evaluation import Estimate, Evaluation, Row
from .harness import harness_interval
from .measures import SHARE
from .store import ANSWERS

JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
_NOTHING = "-"
_MARK = "*"


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> str:
    """Write evaluation.json and evaluation.md into ``folder`` and return the latter's text."""
    text = markdown(evaluation)
    content = json.dumps(as_json(evaluation), indent=1, allow_nan=False, ensure_ascii=False)
    for name, whole in ((JSON_FILE, content + "\n"), (TABLE_FILE, text)):
        write_whole(Path(folder) / name, whole)
    return text


def markdown(evaluation: Evaluation) -> str:
    """Return the table of all models, that of the differences to the first, and what they mean."""
    lines = circumstances(evaluation)
    lines.insert(-1, f"generated answers: {ANSWERS}, which may hold harmful text")
    listed = "\n".join(f"- {line}" for line in lines)
    return "\n\n".join(["# Evaluation", comparison(evaluation), listed]) + "\n"


def comparison(evaluation: Evaluation, level: str = "##") -> str:
    """Return the tables of an evaluation and how to read them, in markdown.

    Args:
        evaluation: what was found.
        level: of the headings.
    """
    names = list(evaluation.models)
    settings = evaluation.settings
    parts = [value_table(evaluation)]
    if any(row.differences for row in evaluation.rows):
        parts += [f"{level} Difference to {names[0]}", _differences(evaluation, names)]
    parts.append(
        f"In brackets: 95 % bootstrap intervals ({settings.resamples:,} resamples of the examples, "
        f"seed {settings.seed}). Differences are paired by example; {_MARK} marks those whose "
        "interval leaves out 0. Losses, margins and KL are in nats a token."
    )
    if evaluation.harness:
        parts.append(
            "lm-evaluation-harness: value and 1.96 standard errors to either side; not paired."
        )
    return "\n\n".join(parts)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return all of an evaluation but for texts: there are none in it."""
    return {
        "models": {
            name: {"source": source, "content": content}
            for name, (source, content) in evaluation.models.items()
        },
        "base": evaluation.base,
        "sets": {
            name: {"source": source, "examples": count}
            for name, (source, count) in evaluation.sets.items()
        },
        "measures": [_row_json(row) for row in evaluation.rows],
        "lm_eval": evaluation.harness,
        "notes": list(evaluation.notes),
        "settings": asdict(evaluation.settings) | {"device": evaluation.settings.place},
        "packages": versions(),
    }


def value_table(evaluation: Evaluation) -> str:
    """Return the measures of all models with their intervals, a markdown table."""
    names = list(evaluation.models)
    rows = [["set", "measure", *names]]
    for row in evaluation.rows:
        cells = [_cell(row, row.estimates.get(name), signed=False) for name in names]
        rows.append([row.measure.set, row.measure.name, *cells])
    rows += _harness_rows(evaluation, names)
    return aligned_table(rows, labels=2)


def _differences(evaluation: Evaluation, names: Sequence[str]) -> str:
    rows = [["set", "measure", *names[1:]]]
    for row in evaluation.rows:
        if row.differences:
            cells = [_cell(row, row.differences.get(name), signed=True) for name in names[1:]]
            rows.append([row.measure.set, row.measure.name, *cells])
    return aligned_table(rows, labels=2)


def _cell(row: Row, estimate: Estimate | None, *, signed: bool) -> str:
    if estimate is None or estimate.value is None:
        return _NOTHING
    if not math.isfinite(estimate.value):
        return "not finite"
    unit = row.measure.unit
    text = _number(estimate.value, unit, signed) + " %" * (unit == SHARE)
    if estimate.interval is None:
        return text
    low, high = estimate.interval
    marked = f" {_MARK}" if signed and (low > 0 or high < 0) else ""
    return f"{text} [{_number(low, unit, signed)}, {_number(high, unit, signed)}]{marked}"


def _number(value: float, unit: str, signed: bool) -> str:
    sign = "+" if signed else ""
    if unit == SHARE:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign},.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"


def _harness_rows(evaluation: Evaluation, names: Sequence[str]) -> list[list[str]]:
    found = [
        (task, metric)
        for results in evaluation.harness.values()
        for task, metrics in results.items()
        for metric in metrics
    ]
    rows = []
    for task, metric in dict.fromkeys(found):
        cells = []
        for name in names:
            value, error = evaluation.harness[name].get(task, {}).get(metric, [None, None])
            if value is None:
                cells.append(_NOTHING)
                continue
            limits = harness_interval(value, error)
            shown = f" [{limits[0]:.3f}, {limits[1]:.3f}]" if limits else ""
            cells.append(f"{value:.3f}{shown}")
        rows.append([f"lm-eval: {task}", metric, *cells])
    return rows


def circumstances(evaluation: Evaluation) -> list[str]:
    """Return on what, of whom and how it was measured, a line each."""
    settings = evaluation.settings
    lines = [
        f"{name}: {count} examples" + f" of {source}" * bool(source)
        for name, (source, count) in evaluation.sets.items()
    ]
    lines += [f"{name}: {source}" for name, (source, _) in evaluation.models.items()]
    lines += evaluation.notes
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines.append(
        f"greedy answers of {settings.max_new_tokens} tokens at most, likelihoods of "
        f"{settings.max_length} with the prompt, batches of {settings.batch_size}, dtype "
        f"{settings.dtype}, {settings.place}; {packages}"
    )
    return lines


def _row_json(row: Row) -> dict[str, Any]:
    measure = row.measure
    models = {}
    for name, ratio in measure.models.items():
        models[name] = {
            **_estimate_json(row.estimates[name]),
            "examples": row.examples(name),
            "totals": list(map(finite, ratio.totals)),
            "weights": ratio.weights,
        }
        if name in row.differences:
            models[name]["difference"] = _estimate_json(row.differences[name])
    return {
        "set": measure.set,
        "measure": measure.name,
        "unit": measure.unit,
        "exponential": measure.exponential,
        "models": models,
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    known = None if estimate.interval is None else list(map(finite, estimate.interval))
    return {"value": finite(estimate.value), "interval": known}


def finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, None for others."""
    return value if value is not None and math.isfinite(value) else None
