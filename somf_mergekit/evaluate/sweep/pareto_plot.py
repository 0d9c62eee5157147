"""A sweep as a picture: safety against skill, with the points that matter numbered."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .swept import WEIGHT
from .variants import BASE, PLAIN, RECIPE

# The most points that have a number and a line in the legend.
MOST_LABELLED = 8
_GRAY, _MARKERS = "0.6", {BASE: "^", PLAIN: "o", RECIPE: "*"}
# Where a number may stand beside its point, nearest first, in pixels; and how far apart all are.
_RADII, _ANGLES, _APART = range(14, 120, 7), [math.radians(a) for a in range(50, 410, 30)], 16
# Inches: 800 pixels wide.
_SIZE, _LINE, _DPI = (8.0, 5.0), 0.19, 100
_Model = Mapping[str, Any]


def write_plot(record: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: every placed model as a point, those of ``labelled`` with number and name.

    Args:
        record: what ``sweep`` returns.
        file: where to.

    Raises:
        OSError: the file can't be written.
    """
    placed = [model for model in record["models"] if model["safety"] is not None]
    named = labelled(placed)
    figure = Figure(
        figsize=(_SIZE[0], _SIZE[1] + _LINE * (len(named) + 3)), dpi=_DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(model["skill"], 100 * model["safety"]) for model in placed]
    colours = iter(range(MOST_LABELLED))
    for model, point in zip(placed, points, strict=True):
        number = record["models"].index(model)
        axes.plot(
            *point,
            linestyle="none",
            marker=_MARKERS.get(model["kind"], "s"),
            markersize=(11 if model["kind"] == RECIPE else 7) if model in named else 4,
            color=f"C{next(colours)}" if model in named else _GRAY,
            markeredgecolor="black" if model["on_front"] else "none",
            markeredgewidth=1.3,
            label=_plain(f"{number}  {_short(model['label'])}") if model in named else "_",
            zorder=3 if model in named else 2,
        )
    _draw_lines(axes, placed, points)
    axes.set_xlabel(_plain(f"skill gain: {record['skill']}"))
    axes.set_ylabel(f"safety: {record['safety']}")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.12), borderaxespad=0)
    of_named = [
        (str(record["models"].index(m)), p)
        for m, p in zip(placed, points, strict=True)
        if m in named
    ]
    _draw_numbers(axes, of_named, points)
    figure.savefig(file, dpi=_DPI)


def labelled(models: Sequence[_Model]) -> list[_Model]:
    """Return the models with a label in the plot: base, recipe, front, plain fusions, chosen.

    Args:
        models: that are placed.
    """
    front = sorted((m for m in models if m["on_front"]), key=lambda model: -model["safety"])
    order = [m for m in models if m["kind"] in (BASE, RECIPE)]
    order += [*front, *(m for m in models if m["kind"] == PLAIN)]
    order += [m for m in models if m.get("chosen")]
    found: list[_Model] = []
    for model in order:
        if model not in found:
            found.append(model)
    return found[:MOST_LABELLED]


def _plain(text: str) -> str:
    """Return a text that matplotlib does not take for a formula: names may have any signs."""
    return text.replace("$", r"\$")


def _short(label: str) -> str:
    return label if len(label) <= 90 else f"{label[:87]}..."


def _draw_numbers(
    axes: Any, named: Sequence[tuple[str, tuple[float, float]]], points: Sequence[Any]
) -> None:
    """Write each number beside its point, where no point and no other number is."""
    axes.figure.draw_without_rendering()
    taken = [tuple(axes.transData.transform(point)) for point in points]
    for number, point in named:
        x, y = axes.transData.transform(point)
        spots = [(x + r * math.cos(a), y + r * math.sin(a)) for r in _RADII for a in _ANGLES]
        free = (s for s in spots if all(math.dist(s, other) >= _APART for other in taken))
        spot = next(free, spots[0])
        taken.append(spot)
        axes.annotate(
            number,
            (x, y),
            xycoords="figure pixels",
            xytext=spot,
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": _GRAY, "linewidth": 0.5, "shrinkB": 4},
            zorder=4,
        )


def _draw_lines(axes: Any, models: Sequence[_Model], points: Sequence[tuple[float, float]]) -> None:
    """Draw the front as a line, and the plain fusions by weight: the line to beat."""
    both = list(zip(models, points, strict=True))
    front = sorted(point for model, point in both if model["on_front"])
    if front:
        style = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 2}
        axes.plot(*zip(*front, strict=True), label="Pareto front (dark edge)", **style)
    lines: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    for model, point in both:
        if model["kind"] == PLAIN:
            others = {k: v for k, v in model["values"].items() if k != WEIGHT}
            lines.setdefault(repr(others), []).append((model["values"].get(WEIGHT, 1.0), point))
    label = "plain fusion by weight, from 0 (the base) on"
    start = [(0.0, point) for model, point in both if model["kind"] == BASE]
    swept = any(WEIGHT in model["values"] for model in models if model["kind"] == PLAIN)
    for line in lines.values() if swept else ():
        ordered = [point for _, point in sorted([*start, *line])]
        axes.plot(*zip(*ordered, strict=True), color=_GRAY, linewidth=1, label=label, zorder=1)
        label = "_"
