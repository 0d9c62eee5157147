"""Tables of a report, in markdown."""

from collections.abc import Iterator, Sequence

from ..common.markdown import aligned_table
from ..mask.census import NO_LAYER, Collapse, MaskSummary, grouped, layer_of
from .curve import CurveRow
from .vectors import VectorSummary

_NAMED = 12


def summary_table(rows: Sequence[MaskSummary], heading: str) -> str:
    """Return summaries as a markdown table with aligned columns."""
    header = [heading, "entries", "mean", "std", "5 %", "95 %", "> 0.5"]
    cells = [header] + [
        [
            row.label,
            f"{row.entries:,}",
            f"{row.mean:.3f}",
            f"{row.deviation:.3f}",
            f"{row.low:.3f}",
            f"{row.high:.3f}",
            f"{100 * row.kept:.1f} %",
        ]
        for row in rows
    ]
    return aligned_table(cells)


def collapse_list(collapses: Sequence[Collapse]) -> str:
    """Return a markdown list of the ways in which masks have collapsed, tensors by name.

    Where they are many, by their kind and layers.
    """
    lines = []
    for collapse in collapses:
        names = [f"`{name}`" for name in collapse.tensors]
        if len(names) > _NAMED:
            names = list(_by_kind(collapse.tensors))
        counted = f"{len(collapse.tensors):,} tensor" + "s" * (len(collapse.tensors) > 1)
        lines.append(f"- **{collapse.what}** ({collapse.meaning}), {counted}: {', '.join(names)}")
    return "\n".join(lines)


def _by_kind(names: Sequence[str]) -> Iterator[str]:
    """Yield many names in few words: a kind of tensor with the layers."""
    for kind, members in grouped(names, "kind").items():
        layers = list(dict.fromkeys(layer_of(name) for name in members))
        if layers == [NO_LAYER]:
            yield f"`{kind}`"
        else:
            yield f"`{kind}` ({'layer' if len(layers) == 1 else 'layers'} {' '.join(layers)})"


def curve_table(rows: Sequence[CurveRow]) -> str:
    """Return the training curve as a markdown table; what no step has is left out."""
    columns: dict[str, list[float | None]] = {
        "loss": [*(row.loss for row in rows)],
        "preference accuracy": [row.accuracy for row in rows],
        "margin": [row.margin for row in rows],
        "utility": [row.utility for row in rows],
    }
    shown = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    cells = [["steps", *shown]]
    for place, row in enumerate(rows):
        steps = f"{row.first}" if row.first == row.last else f"{row.first} to {row.last}"
        cells.append([steps, *(number(values[place]) for values in shown.values())])
    return aligned_table(cells)


def norm_table(groups: Sequence[VectorSummary], labels: Sequence[str]) -> str:
    """Return the norms of task vectors before and after masking, a row for each group."""
    header = ["kind", *(f"{label}, {when}" for label in labels for when in ("before", "after"))]
    cells = [header]
    for group in groups:
        pairs = zip(group.before.norms, group.after.norms, strict=True)
        cells.append([group.label, *(f"{norm:.4g}" for pair in pairs for norm in pair)])
    return aligned_table(cells)


def cosine_table(groups: Sequence[VectorSummary], labels: Sequence[str]) -> str:
    """Return the cosines between task vectors before and after masking, a row for each group."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    header = ["kind"]
    for i, j in pairs:
        header += [f"{labels[i]} and {labels[j]}, {when}" for when in ("before", "after")]
    cells = [header]
    for group in groups:
        values = [gram.cosine(i, j) for i, j in pairs for gram in (group.before, group.after)]
        cells.append([group.label, *map(number, values)])
    return aligned_table(cells)


def number(value: float | None) -> str:
    """Return a number for a table, a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
