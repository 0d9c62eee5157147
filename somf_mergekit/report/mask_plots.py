"""Plots of a learned mask and of the merge that it made."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..common.errors import RecipeError
from ..mask.census import MaskCensus, grouped
from .content import Report, short_names
from .curve import curve_rows
from .vectors import TaskVectors

_DPI = 100
# Inches: a heat map of very many layers or kinds gets smaller cells, not an endless picture.
_LARGEST = 30.0


def write_mask_plot(census: MaskCensus, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG: a heat map of the mean probability, layers against kinds of tensor, and the
    distribution of all probabilities.

    Raises:
        RecipeError: the file can't be written.
    """
    kinds, layers = _places(census.counts)
    figure = _figure(_width(layers, 7), _height(kinds, 1.5), title)
    heat, spread = figure.subplots(1, 2, width_ratios=[2, 1])
    _draw_means(heat, census)
    _draw_spread(spread, census)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise RecipeError(f"plot {path} can't be written: {error}") from error


def write_report_figure(report: Report, path: Path) -> None:
    """Write a PNG of a report: training curve, mask, task vectors.

    Raises:
        OSError: the file can't be written.
    """
    kinds, layers = _places(report.vectors.tensors)
    heat, height = _width(layers, 3.5), _height(kinds, 1.0)
    figure = _figure(min(_LARGEST, 2 * heat + 5), min(_LARGEST, height + 3), None)
    upper, lower = figure.subplots(2, 3, height_ratios=[3, height], width_ratios=[heat, heat, 5])
    _draw_curve(upper[0], report.history, {"loss": "loss", "utility": "utility term"})
    _draw_curve(upper[1], report.history, {"accuracy": "preference accuracy"})
    if report.census:
        _draw_spread(upper[2], report.census)
        _draw_means(lower[0], report.census)
    else:
        _draw_nothing(upper[2], "no tensor has a mask")
        _draw_nothing(lower[0], "no tensor has a mask")
    _draw_growth(lower[1], report.vectors)
    _draw_norms(lower[2], report.vectors)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float, title: str | None) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def _width(layers: Sequence[str], beside: float) -> float:
    return min(_LARGEST, max(5.5, 0.25 * len(layers) + beside))


def _height(kinds: Sequence[str], beside: float) -> float:
    return min(_LARGEST, max(3.5, 0.4 * len(kinds) + beside))


def _places(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the rows and columns of a heat map of tensors: kinds and layers."""
    return list(grouped(names, "kind")), list(grouped(names, "layer"))


def _heat(names: Iterable[str], value: Callable[[list[str]], float | None]) -> np.ndarray:
    """Return a value for the tensors of each kind in each layer, NaN where there are none."""
    kinds, layers = _places(names)
    cells = np.full((len(kinds), len(layers)), np.nan)
    for column, in_layer in enumerate(grouped(names, "layer").values()):
        for kind, found in grouped(in_layer, "kind").items():
            known = value(found)
            if known is not None:
                cells[kinds.index(kind), column] = known
    return cells


def _draw_heat(
    axes: Any, names: Iterable[str], cells: np.ndarray, middle: float, title: str
) -> None:
    kinds, layers = _places(names)
    known = cells[~np.isnan(cells)]
    reach = float(np.abs(known - middle).max()) if known.size else 0.0
    # Small differences are no more than they are, and nothing is below 0.
    reach = min(max(0.01, reach), middle)
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, aspect="auto", cmap="RdBu", vmin=middle - reach, vmax=middle + reach)
    every = max(1, len(layers) // 12)
    shown = [n for n in range(0, len(layers), every) if layers[n].isdigit() or every == 1]
    axes.set_xticks(shown, [layers[n] for n in shown])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes)


def _draw_means(axes: Any, census: MaskCensus) -> None:
    cells = _heat(census.counts, lambda names: census.summary("", names).mean)
    title = "mean probability (blue: kept, red: turned down)"
    _draw_heat(axes, census.counts, cells, 0.5, title)


def _draw_spread(axes: Any, census: MaskCensus) -> None:
    counts = sum(census.counts.values()).numpy()  # type: ignore[union-attr]
    axes.stairs(counts / counts.sum(), np.linspace(0, 1, 257), fill=True)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("probability of an entry\n(a binary mask keeps what is right of the line)")
    axes.set_ylabel("share of entries")


def _draw_curve(axes: Any, history: Sequence[dict[str, Any]], shown: dict[str, str]) -> None:
    drawn = False
    means = curve_rows(history)
    for key, label in shown.items():
        known = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if not known:
            continue
        (line,) = axes.plot(*zip(*known, strict=True), linewidth=0.8, alpha=0.5)
        middles = [(row.first + row.last) / 2 for row in means]
        values = [getattr(row, key) for row in means]
        axes.plot(middles, values, marker="o", color=line.get_color(), label=label)
        drawn = True
    if not drawn:
        _draw_nothing(axes, f"no curve of {' or '.join(shown.values())}")
        return
    axes.set_xlabel("optimiser step (dots: means of several)")
    axes.legend()


def _draw_growth(axes: Any, vectors: TaskVectors) -> None:
    def growth(names: list[str]) -> float | None:
        found = vectors.summary("", names)
        before, after = (sum(n * n for n in g.norms) for g in (found.before, found.after))
        return float((after / before) ** 0.5) if before else None

    cells = _heat(vectors.tensors, growth)
    title = "norm after / before masking (blue: larger, red: smaller)"
    _draw_heat(axes, vectors.tensors, cells, 1.0, title)


def _draw_norms(axes: Any, vectors: TaskVectors) -> None:
    *groups, _ = vectors.kinds()
    labels = short_names(vectors.models)
    thick = 0.8 / max(1, len(labels))
    for number, label in enumerate(labels):
        places = np.arange(len(groups)) - 0.4 + thick * (number + 0.5)
        after = [group.after.norms[number] for group in groups]
        axes.barh(places, after, thick, color=f"C{number}", label=f"{label}, after masking")
        axes.barh(
            places,
            [group.before.norms[number] for group in groups],
            thick,
            fill=False,
            edgecolor="black",
            linewidth=0.8,
            label="before" if number == len(labels) - 1 else None,
        )
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("norm of the task vectors")
    axes.legend()


def _draw_nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
