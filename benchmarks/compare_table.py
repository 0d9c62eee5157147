"""The comparison as tables to read, from its record alone."""

from collections.abc import Sequence
from typing import Any

from somf_mergekit.tables import aligned_table

from .compare_models import SHARED
from .compare_recipes import GROUPS
from .compare_rows import CHAMPION
from .compare_rule import BETTER

HEADINGS = {"two": "Two specialists merged", "three": "Three specialists merged"}
# Name of a measure, heading, factor, digits, unit.
COLUMNS = (
    ("refusals", "refusals", 100, 0, " %"),
    ("over_refusals", "over-refusals", 100, 0, " %"),
    ("safety", "safety", 100, 0, ""),
    ("recovered", "safety recovered", 100, 0, " %"),
    ("preference_accuracy", "preference accuracy", 100, 1, " %"),
    ("preference_margin", "margin", 1, 3, ""),
    ("math_loss", "math loss", 1, 3, ""),
    ("code_loss", "code loss", 1, 3, ""),
    ("general_loss", "general loss", 1, 3, ""),
    ("kept", "skill gain kept", 100, 0, " %"),
    ("over_sweep", "safety over the sweep", 100, 0, ""),
    ("repeated", "repeated 4-grams", 100, 0, " %"),
    ("seconds", "seconds", 1, 0, ""),
    ("peak_bytes", "GiB", 2.0**-30, 1, ""),
)
# What a first look wants to know.
SUMMARY = ("refusals", "over_refusals", "preference_accuracy", "math_loss", "code_loss", "kept")
SUMMARY += ("seconds", "peak_bytes")
UNDOMINATED = "*"
_NOTHING = "-"


def markdown(record: dict[str, Any], plot: str | None) -> str:
    """Return the tables, what they say where the package's own row loses, and how it came about.

    Args:
        record: see ``compare_record.record_of``.
        plot: name of the picture beside the text.
    """
    parts = ["# Ways to merge specialists safely, compared", f"`{record['command']}`"]
    parts += [f"![safety against skill]({plot})"] if plot else []
    parts += ["## In short", summary_table(record)]
    for group, heading in HEADINGS.items():
        entries = [entry for entry in record["entries"] if entry["group"] == group]
        if any(entry["is_line"] for entry in entries):
            parts += [f"## {heading}", main_table(entries), _losses(record, group)]
    parts += ["## How to read it", *_reading(record)]
    if record["validation"]:
        parts += ["## All settings, on validation", validation_table(record["validation"])]
        parts += [f"The rule: {record['rule']}"]
    return "\n\n".join([*parts, "## Circumstances", *_circumstances(record)]) + "\n"


def main_table(entries: Sequence[dict[str, Any]]) -> str:
    """Return what was tested, a row each, mean ± standard deviation over the seeds."""
    champion = CHAMPION[entries[0]["group"]]
    header = ["model", "setting", *(heading for _, heading, *_ in COLUMNS), f"against {champion}"]
    rows = [header]
    for entry in entries:
        found = entry["verdict"]
        rows.append(
            [
                entry["label"] + f" {UNDOMINATED}" * entry["undominated"] + _of_seeds(entry),
                _setting(entry),
                *(_cell(entry, *column) for column in COLUMNS),
                found["is"] if found else _NOTHING,
            ]
        )
    return aligned_table(rows, labels=2)


def summary_table(record: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """Return what was tested in few columns, as the documentation shows it.

    Args:
        record: see ``compare_record.record_of``.
        names: of the rows, in this order; None for all merges of two and what they are made of.
    """
    entries = [entry for entry in record["entries"] if entry["group"] == "two"]
    if names is not None:
        of_row = {name: [e for e in record["entries"] if e["row"] == name] for name in names}
        entries = [entry for name in names for entry in _once(of_row[name])]
    columns = [column for column in COLUMNS if column[0] in SUMMARY]
    rows = [["model", *(heading for _, heading, *_ in columns)]]
    for entry in entries:
        setting = f", {entry['setting']}" if entry["setting"] not in ("", "defaults") else ""
        label = entry["label"] + setting + _of_seeds(entry)
        # A specialist has a skill of its own: the sum over both says little of it.
        kept = {} if entry["is_merge"] else {"mean": {**entry["mean"], "kept": None}}
        rows.append([label, *(_cell({**entry, **kept}, *column) for column in columns)])
    return aligned_table(rows, labels=1)


def _once(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of one group: what is no merge stands in each."""
    return [entry for entry in entries if entry["group"] == entries[0]["group"]]


def validation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return what was measured of every setting on validation."""
    names = ("refusals", "over_refusals", "preference_accuracy", "preference_margin")
    names += tuple(f"{skill}_loss" for skill in GROUPS["three"])
    columns = [column for column in COLUMNS if column[0] in names]
    head = ["model", "setting", *(c[1] for c in columns), "gain, of the plain merge's", "chosen"]
    table = [head]
    for row in rows:
        gain = row["gain_of_plain"]
        chosen = "yes" if row["qualifies"] else "yes, none qualifies"
        table.append(
            [
                row["label"],
                row["setting"],
                *(_cell({"mean": row["measures"], "deviation": {}}, *c) for c in columns),
                _NOTHING if gain is None else f"{100 * gain:.1f} %",
                chosen if row["chosen"] else "",
            ]
        )
    return aligned_table(table, labels=2)


def _of_seeds(entry: dict[str, Any]) -> str:
    known, asked = len(entry["seeds"]), entry["of_seeds"]
    return f" ({known} of {asked} seeds)" if known < asked else ""


def _setting(entry: dict[str, Any]) -> str:
    note = "" if entry["qualifies"] else ", none qualifies"
    return (
        entry["setting"]
        + f" (chosen{note})" * (entry["chosen"] and entry["tests_all"])
        + (note if entry["chosen"] and not entry["tests_all"] else "")
    )


def _cell(
    entry: dict[str, Any], name: str, heading: str, factor: float, digits: int, unit: str
) -> str:
    value = entry["mean"].get(name)
    if value is None:
        return _NOTHING
    text = f"{factor * value:.{digits}f}"
    spread = entry["deviation"].get(name)
    if spread is not None:
        text += f" ± {factor * spread:.{digits}f}"
    return text + unit


def _losses(record: dict[str, Any], group: str) -> str:
    """Say which rows are better than the package's own in both ways."""
    champion = CHAMPION[group]
    if not any(e["row"] == champion and e["group"] == group for e in record["entries"]):
        return f"{champion} is not measured yet: nothing is compared with it."
    losses = [loss for loss in record["losses"] if loss["group"] == group]
    if not losses:
        return f"No row measured here is better than {champion} in both safety and skill."
    lines = [f"**Where {champion} loses** (better in both safety and skill):"]
    for loss in losses:
        how = "beyond the seeds' spread" if loss["is"] == BETTER else "within the seeds' spread"
        if loss["seeds"] == 1:
            how = "one seed, whose spread is not known"
        lines.append(
            f"- {loss['label']}, {loss['setting']}: safety {100 * loss['safety']:+.1f} points, "
            f"skill {100 * loss['skill']:+.1f} points; {how}"
        )
    return "\n".join(lines)


def _reading(record: dict[str, Any]) -> list[str]:
    seeds = record["seeds"]
    spread = (
        "One seed: no spread is known."
        if len(seeds) == 1
        else f"Mean ± standard deviation of {len(seeds)} seeds."
    )
    tokens = record["measuring"]["max_new_tokens"]
    length, dtype = (record["measuring"][name] for name in ("max_length", "dtype"))
    return [
        f"{spread} {record['seed_changes']}",
        f"Refusals: share of harmful prompts whose greedy answer ({tokens} tokens) opens with a "
        "refusal; over-refusals: the same on harmless ones. Safety is the first minus the second. "
        "Safety recovered: share of the aligned base's safety beyond the plain merge's, which is "
        "0 % where the base is 100 %. Margin: nats a token by which the safe answer is the "
        f"likelier. Losses: nats a token, of {length} tokens at most with the prompt. Skill gain "
        "kept: of what the specialists gain over the base, each in its own skill, summed. Repeated "
        "4-grams: in the answers to harmful prompts; gibberish is no refusal. Seconds and GiB "
        "(peak of RssAnon): of learning and merging together, without imports; a mask that was "
        "learned for another merge costs nothing here. -: not known of every seed.",
        f"Losses are of weights in float32, all else of weights in {dtype}.",
        "Safety over the sweep: points more than task_arithmetic has where it is safest with at "
        "least as much skill, on straight lines between the base and the weights that were tried; "
        "- where no weight has as much. Merging less is free and gives safety back, so this is the "
        "line to beat. The last column compares a row with the package's own in safety and in "
        "skill gain kept, seed by seed; beyond the seeds' spread is a mean difference larger than "
        f"the differences' standard deviation. {UNDOMINATED}: no other row is as good in both, and "
        "better in one, in the means over the row's seeds.",
        "An untrained mask that is not drawn but soft is 1 everywhere, the plain merge itself; "
        "without the rescale it is a plain merge of half the weight; thresholded it is the base.",
    ]


def _made_again(record: dict[str, Any]) -> list[str]:
    """Name prepared models that were made again, on another machine, and came out otherwise."""
    seen: dict[str, set[str]] = {}
    for run in record["runs"]:
        for name, content in run.get("inputs", {}).items():
            of_seed = "" if name in SHARED else f" of seed {run['seed']}"
            seen.setdefault(name + of_seed, set()).add(content)
    differing = [f"{name} ({len(found)})" for name, found in seen.items() if len(found) > 1]
    told = "- models made more than once, in the same way, that differ in their bits: "
    return [told + ", ".join(differing)] if differing else []


def _circumstances(record: dict[str, Any]) -> list[str]:
    lines = []
    for found in record["circumstances"] or [record]:
        packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
        source = f"; source {found['source']}" if "source" in found else ""
        lines.append(
            f"- Python {found['python']}, {packages}; {found['system']}, {found['processor']}, "
            f"{found['cores']} cores{source}"
        )
    threads = sorted({run["made"]["threads"] for run in record["runs"] if "made" in run})
    counts = [
        f"- {name}: " + ", ".join(f"{count} {of}" for of, count in split["examples"].items())
        for name, split in record["splits"].items()
    ]
    lines += [f"- threads: {', '.join(map(str, threads))}"] if threads else []
    lines += [*_made_again(record), *counts]
    lines.append(f"- seeds {record['seeds']}, settings chosen on {record['tuned_on']}")
    return ["\n".join(lines), "Every run, with its recipe, stands in the JSON file beside this."]
