"""A frontier as a picture: safety against skill."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .over import WEIGHT
from .points import BASE, PLAIN
from .result import Entry, Frontier, line_of_plain

_GRAY = "0.45"
_MARKERS, _OWN = {BASE: "^", PLAIN: "o"}, "*"
# Where a number may stand beside its marker, nearest first, in pixels; and how far apart all are.
_RADII, _ANGLES, _APART = range(16, 130, 8), [math.radians(a) for a in range(50, 410, 30)], 15
# Inches, of which a legend's line takes the last.
_SIZE, _LINE, _DPI = (11.0, 6.0), 0.21, 120


def write_plot(frontier: Frontier, file: Path) -> None:
    """Write a PNG: every merge with its number in the table, the undominated on a line.

    Raises:
        OSError: the file can't be written.
    """
    entries = [(number, entry) for number, entry in enumerate(frontier.entries) if entry.place]
    height = max(_SIZE[1], 1.5 + _LINE * (len(entries) + 3))
    figure = Figure(figsize=(_SIZE[0], height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = _colours([entry for _, entry in entries])
    for number, entry in entries:
        _draw_entry(axes, number, entry, colours)
    _draw_lines(axes, frontier)
    axes.set_xlabel(_plain(f"skill gain: {frontier.axes.skill_text}, nats a token"))
    axes.set_ylabel(f"safety: {frontier.axes.safety_text}, {frontier.axes.safety_unit}")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    _draw_numbers(axes, entries)
    figure.savefig(file, dpi=_DPI)


def _plain(text: str) -> str:
    """Return a text that matplotlib does not take for a formula: names may have any signs."""
    return text.replace("$", r"\$")


def _xy(entry: Entry) -> tuple[float, float]:
    safety, skill = entry.place or (0.0, 0.0)
    return skill, 100 * safety


def _draw_entry(axes: Any, number: int, entry: Entry, colours: Mapping[str, str]) -> None:
    is_own = entry.is_own and entry.kind != PLAIN
    axes.plot(
        *_xy(entry),
        linestyle="none",
        marker=_OWN if is_own else _MARKERS.get(entry.kind, "s"),
        markersize=13 if is_own else 7,
        color=colours.get(_series(entry), _GRAY),
        markeredgecolor="black" if entry.undominated else "none",
        markeredgewidth=1.5,
        label=_plain(f"{number}  {entry.label}"),
        zorder=3,
    )


def _draw_numbers(axes: Any, entries: Sequence[tuple[int, Entry]]) -> None:
    """Write each merge's number beside it, where no marker and no other number is."""
    axes.figure.draw_without_rendering()
    places = {number: axes.transData.transform(_xy(entry)) for number, entry in entries}
    taken = [tuple(place) for place in places.values()]
    for number, entry in entries:
        x, y = places[number]
        spots = [(x + r * math.cos(a), y + r * math.sin(a)) for r in _RADII for a in _ANGLES]
        free = (s for s in spots if all(math.dist(s, other) >= _APART for other in taken))
        spot = next(free, spots[0])
        taken.append(spot)
        axes.annotate(
            str(number),
            (x, y),
            xycoords="figure pixels",
            xytext=spot,
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=9 if entry.undominated else 8,
            fontweight="bold" if entry.undominated else "normal",
            arrowprops={"arrowstyle": "-", "color": _GRAY, "linewidth": 0.5, "shrinkB": 4},
            zorder=4,
        )


def _draw_lines(axes: Any, frontier: Frontier) -> None:
    """Draw the undominated as a line, and the plain fusions: the line that is to be beaten."""
    best = [_xy(entry) for entry in frontier.undominated]
    if best:
        axes.plot(
            *zip(*best, strict=True),
            color="black",
            linestyle="--",
            linewidth=1,
            label="undominated (bold number, dark edge)",
            zorder=2,
        )
    entries = [entry for entry in frontier.entries if entry.place]
    base = [entry for entry in entries if entry.kind == BASE]
    label = "plain fusion by weight, from 0 (the base) on"
    for line in line_of_plain(entries, WEIGHT):
        points = [_xy(entry) for entry in [*base, *line]]
        axes.plot(*zip(*points, strict=True), color=_GRAY, linewidth=1, label=label, zorder=1)
        label = "_"


def _series(entry: Entry) -> str:
    """Return what entries of one colour have in common: all but their weight."""
    if entry.kind in (BASE, PLAIN):
        return entry.kind
    return repr({name: value for name, value in entry.values.items() if name != WEIGHT})


def _colours(entries: Sequence[Entry]) -> dict[str, str]:
    series = dict.fromkeys(_series(e) for e in entries if e.kind not in (BASE, PLAIN))
    return {name: f"C{number % 10}" for number, name in enumerate(series)}
