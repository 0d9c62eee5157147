"""An evaluation as a table to read and as JSON to go on with."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.console import aligned_table
from ..common.files import write_whole
from ..common.requirements import versions
from .evaluation import BY_PHRASES, NUMBER, SHARE, Estimate, Evaluation, Measure, Row
from .packaged_files import GARAK
from .phrase_judges import GARAK_ERROR, PHRASES_ERROR
from .store import ANSWERS

JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
_NOTHING = "-"
_MARK = "*"
# Half of a 95 % interval in standard errors, which lm-evaluation-harness gives.
_QUANTILE = 1.96


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> str:
    """Write evaluation.json and evaluation.md into ``folder`` and return the latter's text."""
    lines = circumstances(evaluation)
    lines.insert(-1, f"generated answers: {ANSWERS}, which may hold harmful text")
    listed = "\n".join(f"- {line}" for line in lines)
    text = "\n\n".join(["# Evaluation", comparison(evaluation), listed]) + "\n"
    content = json.dumps(as_json(evaluation), indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(Path(folder) / JSON_FILE, content + "\n")
    write_whole(Path(folder) / TABLE_FILE, text)
    return text


def comparison(evaluation: Evaluation, level: str = "##") -> str:
    """Return the tables of an evaluation and how to read them, in markdown.

    Args:
        evaluation: what was found.
        level: of the headings.
    """
    first, *others = evaluation.models
    settings = evaluation.settings
    parts = [value_table(evaluation)]
    rows = [(row, row.differences) for row in evaluation.rows if row.differences]
    if rows:
        table = _table(rows, others, is_signed=True)
        parts += [f"{level} Difference to {first}", table]
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


def value_table(evaluation: Evaluation) -> str:
    """Return the measures of all models with their intervals, a markdown table."""
    rows = [*evaluation.rows, *_harness_rows(evaluation)]
    return _table([(row, row.estimates) for row in rows], list(evaluation.models))


def circumstances(evaluation: Evaluation) -> list[str]:
    """Return on what, of whom and how it was measured, a line each."""
    settings = evaluation.settings
    lines = [
        f"{name}: {count} examples" + (f" of {source}" if source else "")
        for name, (source, count) in evaluation.sets.items()
    ]
    lines += [f"{name}: {source}" for name, (source, _) in evaluation.models.items()]
    lines += [*evaluation.notes, *evaluation.failures]
    measured = {row.measure.name for row in evaluation.rows}
    for name, error in ((BY_PHRASES, PHRASES_ERROR), (f"refusals ({GARAK.name})", GARAK_ERROR)):
        if name in measured:
            lines.append(f"{name}: {error.text}")
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines.append(f"{settings.text}; {packages}")
    return lines


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
        "failures": list(evaluation.failures),
        "settings": asdict(evaluation.settings) | {"device": evaluation.settings.place},
        "packages": versions(),
    }


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, None for others."""
    return value if value is not None and math.isfinite(value) else None


def _table(
    rows: Sequence[tuple[Row, Mapping[str, Estimate]]],
    names: Sequence[str],
    is_signed: bool = False,
) -> str:
    cells = [["set", "measure", *names]]
    for row, estimates in rows:
        unit = row.measure.unit
        found = [_cell(estimates.get(name), unit, is_signed) for name in names]
        cells.append([row.measure.set, row.measure.name, *found])
    return aligned_table(cells, labels=2)


def _cell(estimate: Estimate | None, unit: str, is_signed: bool) -> str:
    if estimate is None or estimate.value is None:
        return _NOTHING
    if not math.isfinite(estimate.value):
        return "not finite"
    sign = "+" if is_signed else ""

    def number(value: float) -> str:
        if unit == SHARE:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign},.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"

    text = number(estimate.value) + (" %" if unit == SHARE else "")
    if estimate.interval is None:
        return text
    low, high = estimate.interval
    marked = f" {_MARK}" if is_signed and (low > 0 or high < 0) else ""
    return f"{text} [{number(low)}, {number(high)}]{marked}"


def _harness_rows(evaluation: Evaluation) -> Iterator[Row]:
    """Yield a row for each metric that lm-evaluation-harness found of some model."""
    metrics = dict.fromkeys(
        (task, metric)
        for results in evaluation.harness.values()
        for task, of_task in results.items()
        for metric in of_task
    )
    for task, metric in metrics:
        estimates = {}
        for name, results in evaluation.harness.items():
            value, error = results.get(task, {}).get(metric, (None, None))
            if value is not None:
                half = None if error is None else _QUANTILE * error
                interval = None if half is None else (value - half, value + half)
                estimates[name] = Estimate(value, interval)
        yield Row(Measure(f"lm-eval: {task}", metric, NUMBER), estimates, {})


def _row_json(row: Row) -> dict[str, Any]:
    measure = row.measure
    models = {}
    for name, ratio in measure.models.items():
        models[name] = {
            **estimate_json(row.estimates[name]),
            "examples": row.examples(name),
            "totals": list(map(_finite, ratio.totals)),
            "weights": ratio.weights,
        }
        if name in row.differences:
            models[name]["difference"] = estimate_json(row.differences[name])
    return {
        "set": measure.set,
        "measure": measure.name,
        "unit": measure.unit,
        "exponential": measure.exponential,
        "models": models,
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON holds it: numbers that are not finite are None."""
    known = None if estimate.interval is None else list(map(_finite, estimate.interval))
    return {"value": _finite(estimate.value), "interval": known}
