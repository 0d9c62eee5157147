"""The models of a sweep: recipes with other values of their parameters."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from ...common.digests import json_digest
from ...recipe.blocks import parameter_blocks, plain
from ...recipe.settings import METHOD_NAME, parameters
from .swept import APPLIED, MASK, WEIGHT, Swept

BASE, MODEL, PLAIN, RECIPE, VARIANT = "base", "model", "plain", "recipe", "variant"
BASE_LABEL, PLAIN_LABEL, RECIPE_LABEL = "aligned base", "plain fusion", "the recipe"


@dataclass(frozen=True)
class Variant:
    """A model of a sweep, and how it is made.

    Attributes:
        entry: the name that it shares with its other settings and seeds.
        label: the model in words; that of one setting is the same for all seeds.
        kind: ``model`` (taken as it is), ``plain`` (the merge without its mask), ``recipe`` (as it
            is) or ``variant`` (of a recipe).
        values: what differs from the recipe.
        recipes: merged one after the other; ``{merged}`` stands for the model made before.
        learns: the recipe of the first recipe's mask, None where that is given or has none.
        mask: what the mask is called, or where it is; empty without one.
        command: makes the model from ``{merged}`` into ``{out}``.
        model: folder or hub id of a model that is taken as it is.
        seed: of all random draws; None for what recipe and options say.
        test_all: whether all settings of the entry are tested, not the chosen one alone.
    """

    entry: str
    label: str
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    recipes: tuple[MergeConfiguration, ...] = field(default=(), repr=False)
    learns: MergeConfiguration | None = field(default=None, repr=False)
    mask: str = ""
    command: str | None = None
    model: str | None = None
    seed: int | None = None
    test_all: bool = True

    @property
    def takes_mask(self) -> bool:
        """Whether the first merge is one of somf, be it the plain fusion."""
        return bool(self.recipes) and self.recipes[0].merge_method == METHOD_NAME


def variants_of(config: MergeConfiguration, swept: Sequence[Swept]) -> list[Variant]:
    """Return the plain fusions, the recipe itself, and the product of all swept values, each once.

    Args:
        config: a somf recipe.
        swept: its parameters that take several values.
    """
    grid = products({one.name: one.values for one in swept})
    fusing = [one.name for one in swept if one.fuses]
    asked = [(PLAIN, {}), *((PLAIN, {name: of[name] for name in fusing}) for of in grid)]
    asked += [(RECIPE, {}), *((VARIANT, of) for of in grid)]
    given = config.parameters or {}
    # What a preset or another parameter may set has no default of its own.
    applied = () if "preset" in given else APPLIED
    defaults = {p.name: p.default for p in parameters() if p.name in applied}
    found: dict[str, Variant] = {}
    for kind, values in asked:
        changed = with_values(config, values)
        said = plain(changed)
        own = {k: v for k, v in said["parameters"].items() if defaults.get(k, ...) != v}
        same = json_digest([kind == PLAIN, {**said, "parameters": own}])
        name = {PLAIN: PLAIN_LABEL, RECIPE: RECIPE_LABEL}.get(kind, "")
        label = ", ".join(filter(None, [name, values_text(values)]))
        deciding = {s.name: values[s.name] for s in swept if s.relearns and s.name in values}
        mask, learns = str(values.get(MASK) or given.get(MASK, "")), None
        if not mask:
            mask, learns = values_text(deciding) or RECIPE_LABEL, with_values(config, deciding)
        variant = Variant(label, label, kind, values, (changed,), learns, mask)
        found.setdefault(same, variant)
    return list(found.values())


def products(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all values combined with all, one mapping each."""
    return [dict(zip(values, of, strict=True)) for of in itertools.product(*values.values())]


def with_values(config: MergeConfiguration, values: Mapping[str, Any]) -> MergeConfiguration:
    """Return a recipe in which parameters have other values, everywhere and for all models.

    ``weight`` is a factor: every weight in the recipe is multiplied by it.
    """
    changed = config.model_copy(deep=True)
    changed.parameters = changed.parameters or {}
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
        changed.parameters.pop("safety_dataset", None)
    return changed


def without_measuring(config: MergeConfiguration) -> MergeConfiguration:
    """Return a recipe that asks for no measurements of its own."""
    given = config.parameters or {}
    own = {k: v for k, v in given.items() if not k.endswith("_eval")}
    return config.model_copy(deep=True, update={"parameters": own})


def values_text(values: Mapping[str, Any]) -> str:
    """Return values in words, as a recipe would have them."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={text(value)}" for name, value in values.items())


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
