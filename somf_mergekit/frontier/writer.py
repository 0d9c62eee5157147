"""The files of a frontier: a table to read, the same as JSON, and a plot."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..contracts import versions
from ..evaluate.coherence import N_GRAM
from ..evaluate.sets import HARMFUL, PAIRS
from ..evaluate.store import ANSWERS
from ..files import whole_file, write_whole
from ..tables import aligned_table
from .axes import ACCURACY, REFUSALS, value
from .making import MEASURED_FOLDER
from .points import RECIPE_LABEL, value_text
from .result import Entry, Frontier

TABLE_FILE, JSON_FILE, FIGURE_FILE = "frontier.md", "frontier.json", "frontier.png"
MARK, NOTHING = "*", "-"
# Of the answers to harmful prompts: gibberish is no refusal.
_REPEATED = f"repeated {N_GRAM}-grams"
_SHARES = (REFUSALS, ACCURACY, _REPEATED)


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """Write frontier.md, frontier.json and frontier.png into ``folder``.

    Raises:
        OSError: they can't be written.
    """
    # matplotlib is slow to come: only where it is used.
    from .plot import write_plot

    content = json.dumps(as_json(frontier), indent=1, allow_nan=False, ensure_ascii=False)
    for name, whole in ((JSON_FILE, content + "\n"), (TABLE_FILE, markdown(frontier))):
        write_whole(folder / name, whole)
    with whole_file(folder / FIGURE_FILE) as partial:
        write_plot(frontier, partial)


def markdown(frontier: Frontier) -> str:
    """Return the table with what it means and how it came about."""
    axes = frontier.axes
    meaning = (
        f"Safety is {axes.safety_text}, in {axes.safety_unit}; skill gain is the {axes.skill_text}"
        f", in nats a token. {MARK} marks the undominated: no other is as good in both and better "
        "in one."
    )
    parts = ["# Frontier", meaning, value_table(frontier), f"![plot]({FIGURE_FILE})"]
    if frontier.failures:
        failed = [f"- {name}: {why}" for name, why in frontier.failures.items()]
        parts += ["## Failed", "\n".join(failed)]
    parts.append("\n".join(f"- {line}" for line in _circumstances(frontier)))
    return "\n\n".join([*parts, f"```yaml\n{frontier.recipe}\n```"]) + "\n"


def value_table(frontier: Frontier) -> str:
    """Return all entries as a markdown table."""
    axes = frontier.axes
    columns = dict(axes.columns)
    if axes.has_prompts:
        columns[_REPEATED] = (HARMFUL, _REPEATED)
    if any(value(entry.found, PAIRS, ACCURACY) is not None for entry in frontier.entries):
        columns["preference accuracy"] = (PAIRS, ACCURACY)
        columns["preference margin"] = (PAIRS, "preference margin")
    head = ["", "#", "merge", f"safety, {axes.safety_unit}", "skill gain", *columns]
    rows = [head]
    for number, entry in enumerate(frontier.entries):
        safety, gain = entry.place or (None, None)
        rows.append(
            [
                MARK * entry.undominated,
                str(number),
                entry.label,
                NOTHING if safety is None else f"{100 * safety:.1f}",
                NOTHING if gain is None else f"{gain:+.4f}",
                *(_cell(entry, *place) for place in columns.values()),
            ]
        )
    return aligned_table(rows, labels=3)


def as_json(frontier: Frontier) -> dict[str, Any]:
    """Return all of a frontier but for texts of data: there are none in it."""
    axes = frontier.axes
    return {
        "recipe": frontier.recipe,
        "over": {swept.name: list(swept.values) for swept in frontier.swept},
        "safety": axes.safety_text,
        "skill": f"{axes.skill_text}, nats a token",
        "merges": [
            {
                "number": number,
                "kind": entry.kind,
                "label": entry.label,
                "values": dict(entry.values),
                "is_recipe": entry.is_own,
                "mask": entry.mask,
                "safety": None if entry.place is None else entry.place[0],
                "skill": None if entry.place is None else entry.place[1],
                "undominated": entry.undominated,
                "measures": entry.found,
            }
            for number, entry in enumerate(frontier.entries)
        ],
        "failures": dict(frontier.failures),
        "masks": dict(frontier.masks),
        "sets": {
            name: {"source": source, "examples": count}
            for name, (source, count) in frontier.sets.items()
        },
        "packages": versions(),
    }


def _cell(entry: Entry, set_name: str, measure: str) -> str:
    found = value(entry.found, set_name, measure)
    if found is None:
        return NOTHING
    return f"{100 * found:.1f} %" if measure in _SHARES else f"{found:.3f}"


def _circumstances(frontier: Frontier) -> Iterator[str]:
    settings = frontier.settings
    for swept in frontier.swept:
        told = ", ".join(map(value_text, swept.values))
        if swept.relearns:
            yield f"{swept.name}: {told}; a mask was learned for each"
        elif swept.name == "weight":
            yield f"weight: all weights of the recipe multiplied by {told}"
        else:
            yield f"{swept.name}: {told}"
    applied = [swept.name for swept in frontier.swept if not swept.relearns]
    if applied and RECIPE_LABEL in frontier.masks:
        yield (
            f"masks were learned with the recipe's own {', '.join(applied)}, and applied with the "
            "others too"
        )
    yield from (f"mask of {label}: {path}" for label, path in frontier.masks.items())
    for name, (source, count) in frontier.sets.items():
        yield f"{name}: {count} examples" + f" of {source}" * bool(source)
    yield (
        f"greedy answers of {settings.max_new_tokens} tokens at most, likelihoods of "
        f"{settings.max_length} with the prompt, batches of {settings.batch_size}, dtype "
        f"{settings.dtype}, {settings.place}"
    )
    yield f"95 % bootstrap intervals of all measures, and more of these: {JSON_FILE}"
    yield f"generated answers: {MEASURED_FOLDER}/{ANSWERS}, which may hold harmful text"
    yield ", ".join(f"{name} {number}" for name, number in versions().items())
