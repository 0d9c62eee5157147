"""Plots of a learned mask and of the merge that it made."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..common.errors import RecipeError
from ..learner.looks import choice
from ..mask.census import MaskCensus, grouped
from .content import Report, curve_rows, short_names
from .vectors import TaskVectors

_DPI = 100
# Legible where a page shrinks the picture to 800 pixels; names may have the signs of a formula.
_STYLE = {"font.size": 12, "legend.fontsize": 11, "axes.titlesize": 13, "text.parse_math": False}
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
# Inches: a heat map of very many layers or kinds gets smaller cells, not an endless picture.
_WIDEST, _HIGHEST = 12.0, 24.0


def write_mask_plot(census: MaskCensus, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG: a heat map of the mean probability, layers against kinds of tensor, and the
    distribution of all probabilities.

    Raises:
        RecipeError: the file can't be written.
    """
    width, height = _size(census.counts)
    with rc_context(_STYLE):
        figure = Figure(figsize=(width + 5, height), layout="constrained")
        figure.suptitle(title)
        heat, distribution = figure.subplots(1, 2, width_ratios=[width, 5])
        _draw_means(heat, census)
        _draw_distribution(distribution, census)
        try:
            figure.savefig(path, dpi=_DPI)
        except OSError as error:
            raise RecipeError(f"plot {path} can't be written: {error}") from error


def write_report_figure(report: Report, path: Path) -> None:
    """Write a PNG of a report: training curve, mask, task vectors.

    Raises:
        OSError: the file can't be written.
    """
    width, height = _size(report.vectors.tensors)
    with rc_context(_STYLE):
        figure = Figure(figsize=(2 * width, 2 * height + 3.5), layout="constrained")
        rows: Any = figure.subfigures(3, 1, height_ratios=[3.5, height, height])
        (loss, accuracy), (means, growth), (distribution, norms) = (r.subplots(1, 2) for r in rows)
        _draw_curve(loss, report.history, {"loss": "loss", "utility": "utility term"})
        _draw_curve(accuracy, report.history, {"accuracy": "preference accuracy"})
        if report.census:
            _draw_means(means, report.census)
            _draw_distribution(distribution, report.census)
        else:
            _draw_nothing(means, "no tensor has a mask")
            _draw_nothing(distribution, "no tensor has a mask")
        _draw_growth(growth, report.vectors)
        _draw_norms(norms, report.vectors)
        figure.savefig(path, dpi=_DPI)


def _size(names: Iterable[str]) -> tuple[float, float]:
    """Return width and height of a heat map of tensors, inches."""
    kinds, layers = _places(names)
    return (
        min(_WIDEST, max(5.5, 0.25 * len(layers) + 3.5)),
        min(_HIGHEST, max(4.0, 0.35 * len(kinds) + 1.2)),
    )


def _places(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the rows and columns of a heat map of tensors: kinds and layers."""
    return list(grouped(names, "kind")), list(grouped(names, "layer"))


def _draw_heat(
    axes: Any,
    names: Iterable[str],
    value: Callable[[list[str]], float | None],
    middle: float,
    title: str,
) -> None:
    """Draw a value of the tensors of each kind in each layer, grey where there is none."""
    kinds, layers = _places(names)
    cells = np.full((len(kinds), len(layers)), np.nan)
    for column, in_layer in enumerate(grouped(names, "layer").values()):
        for kind, found in grouped(in_layer, "kind").items():
            known = value(found)
            if known is not None:
                cells[kinds.index(kind), column] = known
    known_cells = cells[~np.isnan(cells)]
    reach = float(np.abs(known_cells - middle).max()) if known_cells.size else 0.0
    # Small differences shall look small, and nothing is below 0.
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
    title = "mean probability\n(blue: kept, red: turned down)"
    _draw_heat(axes, census.counts, lambda names: census.summary("", names).mean, 0.5, title)


def _draw_growth(axes: Any, vectors: TaskVectors) -> None:
    def growth(names: list[str]) -> float | None:
        found = vectors.summary("", names)
        before, after = (sum(n * n for n in g.norms) for g in (found.before, found.after))
        return float((after / before) ** 0.5) if before else None

    title = "norm after / before masking\n(blue: larger, red: smaller)"
    _draw_heat(axes, vectors.tensors, growth, 1.0, title)


def _draw_distribution(axes: Any, census: MaskCensus) -> None:
    counts = np.sum([count.numpy() for count in census.counts.values()], axis=0)
    axes.stairs(counts / counts.sum(), np.linspace(0, 1, len(counts) + 1), fill=True)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("probability (a binary mask keeps\nwhat is right of the line)")
    axes.set_ylabel("share of entries")


def _draw_curve(axes: Any, history: Sequence[dict[str, Any]], shown: dict[str, str]) -> None:
    means = curve_rows(history)
    for key, label in shown.items():
        known = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if not known:
            continue
        (line,) = axes.plot(*zip(*known, strict=True), linewidth=0.8, alpha=0.5)
        middles = [(row.first + row.last) / 2 for row in means]
        values = [getattr(row, key) for row in means]
        axes.plot(middles, values, marker="o", color=line.get_color(), label=label)
    if not axes.lines:
        _draw_nothing(axes, f"no curve of {' or '.join(shown.values())}")
        return
    kept = choice(history).step
    if kept:
        axes.axvline(kept, color="black", linewidth=0.8, linestyle="--", label="mask taken")
    axes.set_xlabel("optimiser step (dots: means of several)")
    axes.legend(**_ABOVE)


def _draw_norms(axes: Any, vectors: TaskVectors) -> None:
    *groups, _ = vectors.kinds()
    labels = short_names(vectors.models)
    thick = 0.8 / max(1, len(labels))
    for number, label in enumerate(labels):
        places = np.arange(len(groups)) - 0.4 + thick * (number + 0.5)
        after = [group.after.norms[number] for group in groups]
        before = [group.before.norms[number] for group in groups]
        axes.barh(places, after, thick, color=f"C{number}", label=f"{label}, after masking")
        axes.barh(
            places,
            before,
            thick,
            fill=False,
            edgecolor="black",
            linewidth=0.8,
            label="before" if number == len(labels) - 1 else None,
        )
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("norm of the task vectors")
    axes.legend(**_ABOVE)


def _draw_nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
