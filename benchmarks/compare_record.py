"""The record of a comparison: every run, and what follows from them, all of it computed."""

from collections.abc import Iterator
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from somf_mergekit.frontier import undominated

from .circumstances import circumstances
from .compare_models import OF_A_SEED, SHARED
from .compare_recipes import GROUPS
from .compare_rows import CHAMPION, LINE, Row, reference_setting
from .compare_rule import (
    RULE,
    Measures,
    derived,
    safety,
    skill_gain,
    sweep_safety,
    verdict,
)
from .compare_splits import HELD_BACK, VALIDATION, split_counts
from .compare_work import Comparison

SEED_CHANGES = (
    "A seed changes which examples the specialists (and the model tuned for safety) are fine-tuned "
    "on and in which order, the order of the safety pairs, which DPO and the masks share and which "
    "decides the pairs that are used, the noise of the masks, and what DARE and untrained masks "
    "draw. The aligned base, the splits and the examples in them are the same for all seeds."
)

Entry = dict[str, Any]


def record_of(comparison: Comparison, command: str) -> dict[str, Any]:
    """Return all that is known, as JSON."""
    bench, models = comparison.bench, comparison.bench.models
    entries = [entry for group in GROUPS for entry in _entries(comparison, group)]
    trained = {
        name if name in SHARED else f"{name}, seed {seed}": models.training(name, seed)
        for seed in comparison.seeds
        for name in (*SHARED, *OF_A_SEED)
    }
    runs, circumstances_seen = _runs(comparison)
    return {
        "command": command,
        **circumstances(),
        "seeds": comparison.seeds,
        "tuned_on": list(comparison.tuning),
        "seed_changes": SEED_CHANGES,
        "rule": RULE,
        "splits": {
            name: {"examples": split_counts(sets), "digest": bench.split_keys[name]}
            for name, sets in bench.sets.items()
        },
        "measuring": asdict(bench.measuring),
        "models": trained,
        "entries": entries,
        "validation": list(_validation(comparison)),
        "losses": [e for e in map(_told_loss, entries) if e],
        "circumstances": circumstances_seen,
        # Of the first seed: another one has its own number in the recipes.
        "rows": {
            row.name: {name: asdict(making) for name, making in row.settings.items()}
            for row in comparison.order
        },
        "runs": runs,
    }


def restore(comparison: Comparison, record: dict[str, Any]) -> int:
    """Take from an earlier record what the work folder does not know; return how many runs it was.

    Only runs count whose model comes about in the same way; whether their measures still do is
    decided where they are read.
    """
    known = {
        (row.name, setting, None if row.is_shared else seed, run.key): run
        for row in comparison.order
        for seed in comparison.seeds_of(row, comparison.seeds)
        for setting in row.settings
        for run in [comparison.run(row.name, setting, seed)]
    }
    seen = record.get("circumstances", [])

    def whole(part: dict[str, Any]) -> dict[str, Any]:
        number = part.get("circumstances")
        return part if number is None else part | {"circumstances": seen[number]}

    count = 0
    for told in record.get("runs", []):
        run = known.get((told["row"], told["setting"], told["seed"], told.get("key")))
        if run is None or run.record:
            continue
        made = {"made": whole(told["made"])} if "made" in told else {}
        measures = {split: whole(part) for split, part in told["measures"].items()}
        run.restore({**told, **made, "measures": measures})
        count += 1
    return count


def _entries(comparison: Comparison, group: str) -> list[Entry]:
    """Return the rows of one table that are tested, in order."""
    found = []
    for row in comparison.order:
        is_reference = row.group is None and row.name in (*SHARED, *GROUPS[group])
        if row.group != group and not is_reference:
            continue
        choice = comparison.choice(row)
        settings = list(row.settings) if row.tests_all else [choice.setting] if choice else []
        for setting in settings:
            entry = _entry(comparison, group, row, setting)
            if entry["seeds"]:
                entry["chosen"] = bool(choice) and choice.setting == setting
                entry["qualifies"] = bool(choice) and choice.qualifies
                found.append(entry)
    _compare(found, group)
    return found


def _entry(comparison: Comparison, group: str, row: Row, setting: str) -> Entry:
    seeds = {}
    for seed in comparison.seeds:
        measures = comparison.measures(row.name, setting, seed, HELD_BACK)
        if measures is None:
            continue
        seeds[str(seed)] = {
            "measures": dict(measures),
            "derived": _derived(comparison, group, measures, seed),
            "cost": comparison.run(row.name, setting, seed).cost(),
        }
    flat = [{**s["measures"], **(s["derived"] or {}), **(s["cost"] or {})} for s in seeds.values()]
    # A mean over some of the seeds would stand beside means over all.
    names = [n for n in flat[0] if all(v.get(n) is not None for v in flat)] if flat else []
    known = {name: [values[name] for values in flat] for name in names}
    return {
        "row": row.name,
        "label": row.label,
        "setting": setting if row.group else "",
        "group": group,
        "is_merge": row.group is not None or row.name == "aligned",
        "is_line": row.is_line,
        "tests_all": row.tests_all,
        "of_seeds": len(comparison.seeds),
        "seeds": seeds,
        "mean": {name: mean(values) for name, values in known.items()},
        "deviation": {name: stdev(values) for name, values in known.items() if len(flat) > 1},
    }


def _derived(
    comparison: Comparison, group: str, measures: Measures, seed: int
) -> dict[str, float | None] | None:
    base = comparison.prepared("aligned", seed, HELD_BACK)
    plain = comparison.measures(LINE[group], reference_setting(group), seed, HELD_BACK)
    theirs = {skill: comparison.prepared(skill, seed, HELD_BACK) for skill in GROUPS[group]}
    if base is None or plain is None or None in theirs.values():
        return None
    found = derived(measures, base, plain, {k: v for k, v in theirs.items() if v})
    best = sweep_safety(_sweep(comparison, group, base, seed), found["gain"])
    return {**found, "over_sweep": None if best is None else found["safety"] - best}


def _sweep(
    comparison: Comparison, group: str, base: Measures, seed: int
) -> list[tuple[float, float]]:
    """Return safety and gain of the base and of the plain merges of each weight."""
    row = comparison.rows[seed][LINE[group]]
    merges = [comparison.measures(row.name, s, seed, HELD_BACK) for s in row.settings]
    return [
        (safety(measures), skill_gain(measures, base, GROUPS[group]))
        for measures in (base, *merges)
        if measures is not None
    ]


def place(derived_values: dict[str, Any]) -> tuple[float, float]:
    """Return safety and skill: the kept share, or the gain where there is nothing to share."""
    kept = derived_values.get("kept")
    return derived_values["safety"], derived_values["gain"] if kept is None else kept


def _compare(entries: list[Entry], group: str) -> None:
    """Say of each entry whether it is undominated, and how it compares with the package's own."""
    placed = [entry for entry in entries if entry["is_merge"] and "safety" in entry["mean"]]
    champion = next((e for e in entries if e["row"] == CHAMPION[group]), None)
    for entry in entries:
        entry["undominated"] = entry in placed and not any(_beats(o, entry) for o in placed)
        shared = [s for s in entry["seeds"] if champion and s in champion["seeds"]]
        pairs = [
            (entry["seeds"][s]["derived"], champion["seeds"][s]["derived"])
            for s in shared
            if champion
        ]
        known = [(place(one), place(other)) for one, other in pairs if one and other]
        if entry is champion or not known or not entry["is_merge"]:
            entry["verdict"] = None
            continue
        found, differences = verdict([one for one, _ in known], [other for _, other in known])
        entry["verdict"] = {
            "against": CHAMPION[group],
            "is": found,
            "safety": differences[0],
            "skill": differences[1],
            "seeds": len(known),
        }


def _beats(other: Entry, entry: Entry) -> bool:
    """Return whether another one dominates an entry, in the mean of all seeds that this one has."""
    if not entry["seeds"].keys() <= other["seeds"].keys():
        return False
    places = {
        name: [place(one["seeds"][seed]["derived"]) for seed in entry["seeds"]]
        for name, one in (("other", other), ("own", entry))
    }
    means = {
        name: (mean(safety for safety, _ in of_seeds), mean(skill for _, skill in of_seeds))
        for name, of_seeds in places.items()
    }
    return "own" not in undominated(means)


def _told_loss(entry: Entry) -> dict[str, Any] | None:
    """Return what is told of a row that is better than the package's own, in both ways."""
    found = entry["verdict"]
    if not found or not found["is"].startswith("better"):
        return None
    names = ("row", "label", "setting", "group")
    return {**{name: entry[name] for name in names}, **found}


def _validation(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield what was measured on validation of each setting, in the mean of the tuning seeds."""
    for row in comparison.order:
        choice = comparison.choice(row)
        plain = comparison.plain_score(row) if row.group else None
        for setting in row.settings:
            found = [
                comparison.measures(row.name, setting, seed, VALIDATION)
                for seed in comparison.tuning
            ]
            measured = [values for values in found if values is not None]
            if not measured or len(measured) < len(found):
                continue
            known = {n: mean(values[n] for values in measured) for n in measured[0]}
            scored = comparison.validation_scores(row)[setting] if row.group else None
            gain = scored.gain / plain.gain if scored and plain and plain.gain > 0 else None
            yield {
                "row": row.name,
                "label": row.label,
                "setting": setting if row.group else "",
                "chosen": bool(row.group and choice and choice.setting == setting),
                "qualifies": bool(row.group and choice and choice.qualifies),
                "measures": known,
                "score": asdict(scored) if scored else None,
                "gain_of_plain": gain,
            }


def _runs(comparison: Comparison) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of all runs, and the circumstances that they name by number."""
    seen: list[dict[str, Any]] = []

    def numbered(part: dict[str, Any]) -> dict[str, Any]:
        found = part.get("circumstances")
        if found is None:
            return part
        if found not in seen:
            seen.append(found)
        return part | {"circumstances": seen.index(found)}

    runs = []
    for row in comparison.order:
        for seed in comparison.seeds_of(row, comparison.seeds):
            for setting in row.settings:
                run = comparison.run(row.name, setting, seed)
                record = run.record
                if not record:
                    continue
                if "made" in record:
                    record["made"] = numbered(record["made"])
                del record["making"]
                parts = record.get("measures", {})
                record["measures"] = {name: numbered(part) for name, part in parts.items()}
                runs.append(record)
    return runs, seen
