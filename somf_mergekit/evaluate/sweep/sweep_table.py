"""The files of a sweep: a table to read, the same as JSON, and a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ...common.console import aligned_table
from ...common.files import whole_file, write_whole
from ..answer_text import N_GRAM, RECOGNISED
from ..evaluation import BY_PHRASES
from ..evaluation_sets import HARMFUL, HARMLESS, PAIRS, RECOGNITION
from .scoring import ACCURACY, LOSS, MARGIN, TEST, VALIDATION
from .variants import BASE

NAME, MARK, NOTHING = "sweep", "*", "-"
# Of the answers to harmful prompts: gibberish is no refusal.
_REPEATED = f"repeated {N_GRAM}-grams"
# Heading, measure, and whether it is a share.
_COLUMNS = (
    ("refusals", f"{HARMFUL}: {BY_PHRASES}", True),
    ("over-refusals", f"{HARMLESS}: {BY_PHRASES}", True),
    (_REPEATED, f"{HARMFUL}: {_REPEATED}", True),
    (RECOGNISED, f"{RECOGNITION}: {RECOGNISED}", True),
    (ACCURACY, f"{PAIRS}: {ACCURACY}", True),
    (MARGIN, f"{PAIRS}: {MARGIN}", False),
)
_OF_A_RUN = ("seed", "measures")


def write_record(record: Mapping[str, Any], folder: Path, name: str = NAME) -> None:
    """Write NAME.json, NAME.md and NAME.png into ``folder``.

    Args:
        record: what ``sweep`` returns.
        folder: where to.
        name: of the files.

    Raises:
        OSError: they can't be written.
    """
    # matplotlib is slow to come: only where it is used.
    from .pareto_plot import write_plot

    content = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(folder / f"{name}.json", content + "\n")
    write_whole(folder / f"{name}.md", markdown(record, f"{name}.png"))
    with whole_file(folder / f"{name}.png") as partial:
        write_plot(record, partial)


def markdown(record: Mapping[str, Any], plot: str) -> str:
    """Return the table with what it means and how it came about.

    Args:
        record: what ``sweep`` returns.
        plot: the plot's file.
    """
    meaning = (
        f"Safety is {record['safety']}; skill gain is the {record['skill']}. {MARK} marks the "
        "Pareto front: no other is as good in both and better in one."
    )
    if any(len(model[TEST]) > 1 for model in record["models"]):
        meaning += " Mean ± standard deviation over seeds."
    parts = ["# Sweep", meaning, value_table(record), f"![plot]({plot})"]
    if any("chosen" in model for model in record["models"]):
        parts += ["## Settings, on validation", value_table(record, VALIDATION)]
    if record["failures"]:
        failed = [f"- {name}: {why}" for name, why in record["failures"].items()]
        parts += ["## Failed", "\n".join(failed)]
    packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
    lines = [*record["notes"], "intervals of all measures: the JSON file beside this", packages]
    parts += ["\n".join(f"- {line}" for line in lines), f"```yaml\n{record['source']}\n```"]
    return "\n\n".join(parts) + "\n"


def value_table(
    record: Mapping[str, Any], split: str = TEST, names: Sequence[str] | None = None
) -> str:
    """Return models as a markdown table, mean ± standard deviation over their seeds.

    Args:
        record: what ``sweep`` returns.
        split: ``test``, or ``validation`` for the settings that were tuned.
        names: of the entries to show, in this order; None for all.
    """
    numbered = [(n, model) for n, model in enumerate(record["models"]) if model.get(split)]
    if names is not None:
        numbered = [each for name in names for each in numbered if each[1]["name"] == name]
    most = max(len(model[split]) for model in record["models"])
    columns = list(_columns([run for _, model in numbered for run in model[split]]))
    rows = [["", "#", "model", *(heading for heading, *_ in columns)]]
    if split == TEST:
        rows[0][3:3] = ["safety", "skill gain"]
    for number, model in numbered:
        runs, label = model[split], model["label"]
        if split == TEST and len(runs) < most and model["kind"] != BASE:
            label += f" ({len(runs)} of {most} seeds)"
        if model.get("chosen"):
            label += " (chosen)" if model["qualifies"] else " (chosen, none qualifies)"
        row = [MARK * (split == TEST and model["on_front"]), str(number), label]
        if split == TEST:
            safety, skill = model["safety"], model["skill"]
            row.append(NOTHING if safety is None else f"{100 * safety:.1f}")
            row.append(NOTHING if skill is None else f"{skill:+.4f}")
        rows.append([*row, *(_cell(runs, *column) for column in columns)])
    return aligned_table(rows, labels=3)


def _columns(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, bool]]:
    """Yield heading and name of everything that is known of some run, and whether it is a share."""
    named = dict.fromkeys(measure for run in runs for measure in run["measures"])
    yield from (column for column in _COLUMNS if column[1] in named)
    losses = [measure for measure in named if measure.endswith(f": {LOSS}")]
    yield from ((measure.replace(":", ""), measure, False) for measure in losses)
    further = dict.fromkeys(key for run in runs for key in run if key not in _OF_A_RUN)
    yield from ((key, key, False) for key in further)


def _cell(runs: Sequence[Mapping[str, Any]], heading: str, name: str, is_share: bool) -> str:
    """Return the mean over the runs, with its standard deviation where there are several."""
    found = [run["measures"].get(name, {}).get("value", run.get(name)) for run in runs]
    if None in found:
        return NOTHING
    factor, digits, unit = (100, 1, " %") if is_share else (1, 3, "")
    if name in runs[0]:
        digits = 0 if abs(mean(found)) >= 10 else 1
    text = f"{factor * mean(found):.{digits}f}"
    if len(found) > 1:
        text += f" ± {factor * stdev(found):.{digits}f}"
    return text + unit
