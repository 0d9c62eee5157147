"""What a frontier found: every merge with its place, and which of them none other beats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluate.settings import EvaluationSettings
from .axes import Axes, Found
from .over import Swept
from .points import BASE, PLAIN, RECIPE
from .undominated import undominated


@dataclass(frozen=True)
class Entry:
    """A model of a frontier.

    Attributes:
        kind: ``base``, ``plain``, ``recipe`` or ``point``.
        name: of the model, in words.
        values: what differs from the recipe.
        is_own: whether nothing does: the recipe as it is, with its mask or without.
        mask: the label of its mask; None without one.
        found: what was measured.
        place: (safety, skill); None where it could not be measured.
        undominated: whether no other is as good in both and better in one.
    """

    kind: str
    name: str
    values: Mapping[str, Any]
    is_own: bool
    mask: str | None
    found: Found
    place: tuple[float, float] | None = None
    undominated: bool = False

    @property
    def label(self) -> str:
        """The model in words, and whether it is the recipe's own."""
        return self.name + " (as in the recipe)" * (self.is_own and self.kind not in (RECIPE, BASE))


@dataclass(frozen=True)
class Frontier:
    """What a frontier found.

    Attributes:
        recipe: YAML.
        swept: what was swept.
        axes: what safety and skill are.
        entries: the base first, then the plain fusions, the recipe, the points.
        failures: why a merge has no entry, by its name.
        masks: where each mask is, by its label.
        sets: where each set is from, in words, and how many examples of it were used.
        settings: of the measuring.
    """

    recipe: str
    swept: Sequence[Swept]
    axes: Axes
    entries: Sequence[Entry]
    failures: Mapping[str, str]
    masks: Mapping[str, str]
    sets: Mapping[str, tuple[str, int]]
    settings: EvaluationSettings

    @property
    def undominated(self) -> list[Entry]:
        """The merges that no other beats, by rising skill."""
        best = [entry for entry in self.entries if entry.undominated and entry.place]
        return sorted(best, key=lambda entry: entry.place[1] if entry.place else 0.0)


def placed(entries: Sequence[Entry], axes: Axes) -> list[Entry]:
    """Return entries with their places, and which of them no other beats."""
    places = {number: axes.place(entry.found) for number, entry in enumerate(entries)}
    best = undominated({str(number): place for number, place in places.items() if place})
    return [
        replace(entry, place=places[number], undominated=str(number) in best)
        for number, entry in enumerate(entries)
    ]


def line_of_plain(entries: Sequence[Entry], name: str) -> list[list[Entry]]:
    """Return the plain fusions that differ in a factor alone, by its rising value.

    Args:
        entries: of a frontier.
        name: of the factor; the recipe as it is has 1.
    """
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == PLAIN:
            others = {k: v for k, v in entry.values.items() if k != name}
            lines.setdefault(repr(others), []).append(entry)
    return [
        sorted(line, key=lambda entry: entry.values.get(name, 1.0))
        for line in lines.values()
        if any(name in entry.values for entry in line)
    ]
