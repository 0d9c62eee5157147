"""How a learned mask is distributed, by layer and kind of tensor, and where it has collapsed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .artifact import MaskSet

NO_LAYER = "other"
_LAYER = re.compile(r"\.(\d+)\.")
# Probabilities beyond these are as good as 1 and 0.
_KEPT, _DROPPED = 0.95, 0.05
# A tensor has collapsed where so many of its entries have: a single one, such as of a token that no
# pair has, hides nothing.
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

    Attributes:
        levels: the probabilities that entries can have, (levels,).
        counts: how many entries have each, (levels,), by tensor.
    """

    def __init__(self, masks: MaskSet, mask_names: Mapping[str, str] | None = None):
        """Count ``masks``.

        Args:
            masks: the learned ones.
            mask_names: the names of tensors, with the names under which their masks are stored; all
                that have a mask where not given.
        """
        names = mask_names or {name: name for name in masks.names()}
        self.levels = masks.levels()
        self.counts = {name: masks.histogram(stored) for name, stored in names.items()}

    @classmethod
    def combined(cls, censuses: Sequence["MaskCensus"]) -> "MaskCensus":
        """Return the counts of the masks of several models together."""
        if len(censuses) == 1:
            return censuses[0]
        found = cls.__new__(cls)
        found.levels = max((one.levels for one in censuses), key=len)
        found.counts = {}
        for one in censuses:
            for name, own in one.counts.items():
                # Packed masks have the lowest level and the highest.
                places = slice(None, None, max(1, (len(found.levels) - 1) // (len(own) - 1)))
                counts = found.counts.setdefault(
                    name, torch.zeros(len(found.levels), dtype=own.dtype)
                )
                counts[places] += own
        return found

    def summary(self, label: str, names: Sequence[str]) -> MaskSummary:
        """Return the summary of all entries of the tensors ``names``."""
        counts = torch.stack([self.counts[name] for name in names]).sum(dim=0).double()
        levels = self.levels
        total = float(counts.sum())
        mean = float((counts * levels).sum()) / total
        variance = float((counts * (levels - mean) ** 2).sum()) / total
        cumulated = counts.cumsum(0) / total
        low, high = (float(levels[int((cumulated < q).sum())]) for q in (0.05, 0.95))
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
        levels, nearly = self.levels, f"at least {100 * _NEARLY_ALL:.0f} % of the probabilities are"
        ways = (
            ("all kept", f"{nearly} above {_KEPT}", levels > _KEPT, _NEARLY_ALL),
            ("all dropped", f"{nearly} below {_DROPPED}", levels < _DROPPED, _NEARLY_ALL),
            (
                "binary mask full",
                "every probability is above 0.5: a binary mask keeps all",
                levels > 0.5,
                1.0,
            ),
            (
                "binary mask empty",
                "no probability is above 0.5: under `mask_kind: binary`, nothing of the tensor's "
                "change is merged",
                levels <= 0.5,
                1.0,
            ),
        )
        counts = self.counts.items()
        found = [
            Collapse(what, meaning, [name for name, n in counts if n[at].sum() >= share * n.sum()])
            for what, meaning, at, share in ways
        ]
        even = [name for name, n in counts if n.sum() > 1 and (n > 0).sum() == 1]
        meaning = "all entries are alike: a mask divided by its mean then does nothing"
        found.append(Collapse("even", meaning, even))
        return [collapse for collapse in found if collapse.tensors]


def layer_of(name: str) -> str:
    """Return the layer number in a tensor's name, ``other`` where there is none."""
    found = _LAYER.search(name)
    return found.group(1) if found else NO_LAYER


def kind_of(name: str) -> str:
    """Return a tensor's name without its layer: ``self_attn.q_proj`` for every layer's queries.

    Experts of a layer are of one kind.
    """
    found = _LAYER.search(name)
    rest = name[found.end() :] if found else name
    return re.sub(r"\.\d+\.", ".*.", rest).removesuffix(".weight")


def grouped(names: Iterable[str], key: str) -> dict[str, list[str]]:
    """Return names by their ``layer`` or ``kind``: layers in order, kinds as they come."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        groups.setdefault(layer_of(name) if key == "layer" else kind_of(name), []).append(name)
    if key == "kind":
        return groups
    return {layer: groups[layer] for layer in sorted(groups, key=natural)}


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
