"""How a learned mask is distributed, and where it has collapsed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .artifact import MaskSet
from .tensor_groups import grouped

# Probabilities beyond these are as good as 1 and 0.
_KEPT, _DROPPED = 0.95, 0.05
# A tensor is as good as kept or dropped where so many of its entries are: a stray one, such as of a
# token that no pair has, hides nothing.
_NEARLY_ALL = 0.99


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


@dataclass(frozen=True)
class Collapse:
    """A way in which a mask says next to nothing, with the tensors where it does.

    Attributes:
        what: the way, in a few words.
        meaning: what follows, in words.
        tensors: names.
    """

    what: str
    meaning: str
    tensors: list[str]


class MaskCensus:
    """Counts of probabilities per tensor, from which any grouping is summarised.

    A stored probability has 256 levels, so one histogram a tensor says everything.
    """

    def __init__(self, masks: MaskSet, kept_as: Mapping[str, str] | None = None):
        """Count ``masks``.

        Args:
            masks: the learned ones.
            kept_as: the names of tensors, with the names under which their masks are kept; all
                that have a mask where not given.
        """
        names = kept_as or {name: name for name in masks.names()}
        self.counts = {name: masks.histogram(kept) for name, kept in names.items()}
        self.levels = masks.levels()

    def summary(self, label: str, names: Sequence[str]) -> MaskSummary:
        """Return the summary of all entries of the tensors ``names``."""
        counts = torch.stack([self.counts[name] for name in names]).sum(dim=0).double()
        levels = self.levels
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
        return [self.summary(label, names) for label, names in grouped(self.counts, key).items()]

    def total(self) -> MaskSummary:
        """Return the summary of the whole mask."""
        return self.summary("all", list(self.counts))

    def collapses(self) -> list[Collapse]:
        """Return each way in which some tensor's mask has collapsed; a tensor may be in several."""
        found: list[Collapse] = []
        nearly = f"at least {100 * _NEARLY_ALL:.0f} % of the probabilities are"
        ways = (
            ("all kept", f"{nearly} above {_KEPT}", self.levels > _KEPT, _NEARLY_ALL),
            ("all dropped", f"{nearly} below {_DROPPED}", self.levels < _DROPPED, _NEARLY_ALL),
            (
                "binary mask full",
                "every probability is above 0.5: a binary mask keeps all",
                self.levels > 0.5,
                1.0,
            ),
            (
                "binary mask empty",
                "no probability is above 0.5: under `mask_kind: binary`, nothing of the tensor's "
                "change is merged",
                self.levels <= 0.5,
                1.0,
            ),
        )
        for what, meaning, counted, share in ways:
            inside = [
                name
                for name, counts in self.counts.items()
                if int(counts[counted].sum()) >= share * int(counts.sum())
            ]
            found.append(Collapse(what, meaning, inside))
        even = [
            name
            for name, counts in self.counts.items()
            if counts.sum() > 1 and (counts > 0).sum() == 1
        ]
        meaning = "all entries are alike: a mask divided by its mean then does nothing"
        found.append(Collapse("even", meaning, even))
        return [collapse for collapse in found if collapse.tensors]
