"""A sweep as a picture: safety against skill, with the points that matter numbered."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .variants import BASE, PLAIN, RECIPE, WEIGHT

# The most points that have a number and a line in the legend.
MOST_LABELLED = 8
_GRAY, _MARKERS = "0.6", {BASE: "^", PLAIN: "o", RECIPE: "*"}
# Where a number may stand beside its point, nearest first, in pixels; and how far apart all are.
_RADII, _ANGLES, _APART = range(14, 120, 7), [math.radians(a) for a in range(50, 410, 30)], 16
# Inches: 800 pixels wide.
_SIZE, _LINE, _DPI = (8.0, 5.0), 0.19, 100
_LONGEST_LABEL = 90
_Model = Mapping[str, Any]


def write_plot(record: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: every placed model as a point, those of ``labelled`` with number and name.

    Args:
        record: what ``sweep`` returns.
        file: where to.

    Raises:
        OSError: the file can't be written.
    """
    placed = [
        (number, model, (model["skill"], 100 * model["safety"]))
        for number, model in enumerate(record["models"])
        if model["safety"] is not None
    ]
    named = labelled([model for _, model, _ in placed])
    height = _SIZE[1] + _LINE * (len(named) + 3)
    figure = Figure(figsize=(_SIZE[0], height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # C7 is grey, as all that has no name.
    colours = iter([f"C{number}" for number in range(10) if number != 7])
    for number, model, point in placed:
        is_named = model in named
        size = 4 if not is_named else 11 if model["kind"] == RECIPE else 7
        axes.plot(
            *point,
            linestyle="none",
            marker=_MARKERS.get(model["kind"], "s"),
            markersize=size,
            color=next(colours) if is_named else _GRAY,
            markeredgecolor="black" if model["on_front"] else "none",
            markeredgewidth=1.3,
            label=f"{number}  {_plain(model['label'][:_LONGEST_LABEL])}" if is_named else "_",
            zorder=3 if is_named else 2,
        )
    points = [(model, point) for _, model, point in placed]
    _draw_front(axes, points)
    _draw_plain_fusions(axes, points)
    axes.set_xlabel(_plain(f"skill gain: {record['skill']}"))
    axes.set_ylabel(f"safety: {record['safety']}")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.12), borderaxespad=0)
    numbers = {str(number): point for number, model, point in placed if model in named}
    _draw_numbers(axes, numbers, [point for _, point in points])
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


def _draw_numbers(
    axes: Any, numbers: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]
) -> None:
    """Write each number beside its point, where no point and no other number is."""
    axes.figure.draw_without_rendering()
    taken = [tuple(axes.transData.transform(point)) for point in points]
    for number, point in numbers.items():
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


def _draw_front(axes: Any, points: Sequence[tuple[_Model, tuple[float, float]]]) -> None:
    front = sorted(point for model, point in points if model["on_front"])
    if front:
        style = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 2}
        axes.plot(*zip(*front, strict=True), label="Pareto front (dark edge)", **style)


def _draw_plain_fusions(axes: Any, points: Sequence[tuple[_Model, tuple[float, float]]]) -> None:
    """Draw the plain fusions by weight as lines from the base on: the lines to beat."""
    start = [(0.0, point) for model, point in points if model["kind"] == BASE]
    lines: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    for model, point in points:
        if model["kind"] == PLAIN:
            others = {k: v for k, v in model["values"].items() if k != WEIGHT}
            weight = model["values"].get(WEIGHT, 1.0)
            lines.setdefault(repr(others), []).append((weight, point))
    if all(weight == 1 for line in lines.values() for weight, _ in line):
        return
    label = "plain fusion by weight, from 0 (the base) on"
    for line in lines.values():
        ordered = [point for _, point in sorted([*start, *line])]
        axes.plot(*zip(*ordered, strict=True), color=_GRAY, linewidth=1, label=label, zorder=1)
        label = "_"
