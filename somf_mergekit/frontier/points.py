"""The points of a frontier: a recipe with other values, each with the mask that it takes."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from ..recipe_blocks import parameter_blocks
from .over import MASK, WEIGHT, Swept

BASE, PLAIN, RECIPE, POINT = "base", "plain", "recipe", "point"
BASE_LABEL, PLAIN_LABEL, RECIPE_LABEL = "aligned base", "plain fusion", "the recipe"
_DATASET = "safety_dataset"


@dataclass(frozen=True)
class Point:
    """A merge of a frontier.

    Attributes:
        kind: ``plain`` (without a mask), ``recipe`` (the recipe as it is) or ``point``.
        values: what differs from the recipe.
        learned_with: those of the values that decide the mask.
        config: the recipe with these values.
    """

    kind: str
    values: Mapping[str, Any]
    learned_with: Mapping[str, Any]
    config: MergeConfiguration = field(repr=False)

    @property
    def label(self) -> str:
        """The point in words."""
        told = values_text(self.values)
        if self.kind == PLAIN:
            return ", ".join(filter(None, [PLAIN_LABEL, told]))
        return RECIPE_LABEL if self.kind == RECIPE else told


def points_of(config: MergeConfiguration, swept: Sequence[Swept]) -> list[Point]:
    """Return the plain fusions, the recipe's own point, and the product of all that is swept."""
    grid = [
        dict(zip([s.name for s in swept], values, strict=True))
        for values in itertools.product(*(s.values for s in swept))
    ]
    fusing = [s.name for s in swept if s.fuses]
    learned = [s.name for s in swept if s.relearns]

    def point(kind: str, values: dict[str, Any]) -> Point:
        deciding = {name: values[name] for name in learned if name in values}
        return Point(kind, values, deciding, with_values(config, values))

    unmasked = _distinct([*({name: values[name] for name in fusing} for values in grid), {}])
    return [
        *(point(PLAIN, values) for values in unmasked),
        point(RECIPE, {}),
        *(point(POINT, values) for values in grid),
    ]


def with_values(config: MergeConfiguration, values: Mapping[str, Any]) -> MergeConfiguration:
    """Return a recipe in which parameters have other values, everywhere and for all models.

    ``weight`` is a factor: every weight in the recipe is multiplied by it.
    """
    changed = config.model_copy(deep=True)
    if changed.parameters is None:
        changed.parameters = {}
    for name, value in values.items():
        for _, block, _ in parameter_blocks(changed):
            if name in block:
                if name == WEIGHT:
                    block[name] = _scaled(block[name], value)  # type: ignore[index]
                else:
                    del block[name]  # type: ignore[attr-defined]
        if name != WEIGHT:
            changed.parameters[name] = value
    if MASK in values:
        changed.parameters.pop(_DATASET, None)
    return changed


def with_mask(config: MergeConfiguration, mask: str) -> MergeConfiguration:
    """Return a recipe that takes a learned mask, which it may name already."""
    return with_values(config, {MASK: mask})


def without_measuring(config: MergeConfiguration) -> MergeConfiguration:
    """Return a recipe that asks for no measurements of its own."""
    changed = config.model_copy(deep=True)
    given = changed.parameters or {}
    changed.parameters = {k: v for k, v in given.items() if not k.endswith("_eval")}
    return changed


def values_text(values: Mapping[str, Any]) -> str:
    """Return values in words."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in values.items())


def value_text(value: Any) -> str:
    """Return a value as a recipe would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def file_name(text: str) -> str:
    """Return a text as the name of a file or folder, which other texts may share."""
    return re.sub(r"[^\w=.+-]+", "_", text)[:80].strip("._")


def _scaled(setting: Any, factor: float) -> Any:
    """Return a setting of mergekit with each of its numbers multiplied."""
    if isinstance(setting, list):
        return [_scaled(item, factor) for item in setting]
    if isinstance(setting, ConditionalParameter):
        return setting.model_copy(update={"value": _scaled(setting.value, factor)})
    return float(setting) * factor


def _distinct(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [values for number, values in enumerate(found) if values not in found[:number]]
