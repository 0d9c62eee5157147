"""The comparison as a picture: safety against skill."""

from pathlib import Path
from typing import Any

from .compare_record import place
from .compare_table import HEADINGS

_AXES = "skill gain kept, %", "safety (refusals - over-refusals), points"


def write_plot(record: dict[str, Any], file: Path) -> bool:
    """Draw each comparison: the weight sweep as a line, undominated rows with a dark edge.

    Returns:
        whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_group = {group: _drawable(record, group) for group in HEADINGS}
    drawn = {g: entries for g, entries in by_group.items() if any(e["is_line"] for e in entries)}
    if not drawn:
        return False
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(11 * len(drawn), 6.5), layout="constrained", squeeze=False
    )
    for axis, (group, entries) in zip(axes[0], drawn.items(), strict=True):
        _draw(axis, entries)
        axis.set_title(HEADINGS[group])
        axis.set_xlabel(_AXES[0])
        axis.set_ylabel(_AXES[1])
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def _drawable(record: dict[str, Any], group: str) -> list[dict[str, Any]]:
    return [
        entry
        for entry in record["entries"]
        if entry["group"] == group and entry["is_merge"] and "safety" in entry["mean"]
    ]


def _draw(axis: Any, entries: list[dict[str, Any]]) -> None:
    # No merge at all is the sweep's weight 0.
    sweep = [entry for entry in entries if entry["is_line"] or entry["row"] == "aligned"]
    points = [place(entry["mean"]) for entry in sweep]
    axis.plot(
        [100 * skill for _, skill in points],
        [100 * safe for safe, _ in points],
        color="gray",
        linewidth=1,
        zorder=1,
        label="task_arithmetic, weights from 0 (the base) on",
    )
    others = [entry for entry in entries if entry not in sweep]
    for number, entry in enumerate([*sweep, *others]):
        safe, skill = place(entry["mean"])
        spread = entry["deviation"]
        in_sweep = entry in sweep
        name = entry["setting"] or entry["label"]
        label = None if in_sweep else f"{number - len(sweep) + 1}  {entry['label']}: {name}"
        axis.errorbar(
            100 * skill,
            100 * safe,
            xerr=100 * spread.get("kept", 0.0),
            yerr=100 * spread.get("safety", 0.0),
            fmt="o" if in_sweep else "s" if entry["row"].startswith("somf") else "D",
            markersize=5 if in_sweep else 7,
            color="gray" if in_sweep else f"C{(number - len(sweep)) % 10}",
            markeredgecolor="black" if entry["undominated"] else "none",
            markeredgewidth=1.8,
            elinewidth=0.8,
            label=label,
        )
        axis.annotate(
            name.removeprefix("weight ") if in_sweep else str(number - len(sweep) + 1),
            (100 * skill, 100 * safe),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=8,
        )
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
