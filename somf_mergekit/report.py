"""Tables and plots of a learned mask."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import RecipeError
from .masks import MaskSet
from .tables import aligned_table

_LAYER = re.compile(r"\.(\d+)\.")
NO_LAYER = "other"


@dataclass(frozen=True)
class MaskSummary:
    """How the mask of one tensor, or of a group of them, is distributed.

    Attributes:
        label: of the tensor or group.
        entries: mask entries.
        mean: of the probability.
        deviation: standard deviation of the probability.
        low, high: the 5th and 95th percentile.
        kept: share of entries above 0.5, those of a binary mask.
    """

    label: str
    entries: int
    mean: float
    deviation: float
    low: float
    high: float
    kept: float


def layer_of(name: str) -> str:
    """Return the layer number in a tensor's name, ``other`` where there is none."""
    found = _LAYER.search(name)
    return found.group(1) if found else NO_LAYER


def kind_of(name: str) -> str:
    """Return a tensor's name without its layer: ``self_attn.q_proj`` for every layer's queries."""
    found = _LAYER.search(name)
    rest = name[found.end() :] if found else name
    return rest.removesuffix(".weight")


class MaskCensus:
    """Counts of probabilities per tensor, from which any grouping is summarised.

    A stored probability has 256 levels, so one histogram a tensor says everything.
    """

    def __init__(self, masks: MaskSet):
        import torch

        self.counts = {}
        for name in masks.names():
            levels = (masks.entries(name) * 256).long().clamp_(0, 255)
            self.counts[name] = torch.bincount(levels.flatten(), minlength=256)

    def summary(self, label: str, names: Sequence[str]) -> MaskSummary:
        """Return the summary of all entries of the tensors ``names``."""
        import torch

        counts = torch.stack([self.counts[name] for name in names]).sum(dim=0).double()
        levels = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
        total = float(counts.sum())
        mean = float((counts * levels).sum()) / total
        variance = float((counts * (levels - mean) ** 2).sum()) / total
        cumulated = counts.cumsum(0) / total
        low, high = (float(levels[int((cumulated < q).sum().clamp(max=255))]) for q in (0.05, 0.95))
        return MaskSummary(
            label=label,
            entries=int(total),
            mean=mean,
            deviation=variance**0.5,
            low=low,
            high=high,
            kept=float(counts[levels > 0.5].sum()) / total,
        )

    def groups(self, key: str) -> list[MaskSummary]:
        """Return one summary per ``layer`` or per ``kind`` of tensor, in order."""
        group_of = {"layer": layer_of, "kind": kind_of}[key]
        names: dict[str, list[str]] = {}
        for name in sorted(self.counts, key=_natural):
            names.setdefault(group_of(name), []).append(name)
        ordered = sorted(names, key=_natural) if key == "layer" else list(names)
        return [self.summary(label, names[label]) for label in ordered]

    def total(self) -> MaskSummary:
        """Return the summary of the whole mask."""
        return self.summary("all", list(self.counts))


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


def write_mask_plot(census: MaskCensus, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG: a heat map of the mean probability, layers against kinds of tensor, and the
    distribution of all probabilities.

    Raises:
        RecipeError: the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    names = sorted(census.counts, key=_natural)
    layers = list(dict.fromkeys(layer_of(name) for name in names if layer_of(name) != NO_LAYER))
    kinds = list(dict.fromkeys(kind_of(name) for name in names if layer_of(name) != NO_LAYER))
    means = np.full((len(kinds), len(layers)), np.nan)
    for name in names:
        if layer_of(name) != NO_LAYER:
            where = kinds.index(kind_of(name)), layers.index(layer_of(name))
            means[where] = census.summary(name, [name]).mean
    figure, (heat, spread) = plt.subplots(
        1,
        2,
        figsize=(max(8.0, 0.28 * len(layers) + 7), max(3.5, 0.4 * len(kinds) + 1.5)),
        width_ratios=[2, 1],
        layout="constrained",
    )
    if means.size:
        reach = max(0.01, float(np.nanmax(np.abs(means - 0.5))))
        image = heat.imshow(means, aspect="auto", cmap="RdBu", vmin=0.5 - reach, vmax=0.5 + reach)
        heat.set_xticks(range(0, len(layers), max(1, len(layers) // 12)))
        heat.set_xticklabels(layers[:: max(1, len(layers) // 12)])
        heat.set_yticks(range(len(kinds)), kinds)
        heat.set_xlabel("layer")
        heat.set_title("mean probability (blue: kept, red: turned down)")
        figure.colorbar(image, ax=heat)
    counts = sum(census.counts.values()).numpy()  # type: ignore[union-attr]
    spread.stairs(counts / counts.sum(), np.linspace(0, 1, 257), fill=True)
    spread.set_xlabel("probability of an entry")
    spread.set_ylabel("share of entries")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RecipeError(f"plot {path} can't be written: {error}") from error
    finally:
        plt.close(figure)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
