"""The models of a sweep: recipes with other values of their parameters."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from ...recipe.blocks import parameter_blocks, plain
from ...recipe.settings import METHOD_NAME, parameters
from .over import APPLIED, MASK, WEIGHT, Swept

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
    values = itertools.product(*(s.values for s in swept))
    grid = [dict(zip([s.name for s in swept], of_one, strict=True)) for of_one in values]
    fusing = [{s.name: of_one[s.name] for s in swept if s.fuses} for of_one in grid]
    asked = [(PLAIN, {}), *((PLAIN, of_one) for of_one in fusing)]
    asked += [(RECIPE, {}), *((VARIANT, of_one) for of_one in grid)]
    # What a preset or another parameter may set has no default of its own.
    has_preset = "preset" in (config.parameters or {})
    defaults = {p.name: p.default for p in parameters() if p.name in APPLIED and not has_preset}
    found, known = [], []
    for kind, differing in asked:
        changed = with_values(config, differing)
        said = plain(changed)
        own = {k: v for k, v in said["parameters"].items() if defaults.get(k, ...) != v}
        same = [kind == PLAIN, {**said, "parameters": own}]
        if same in known:
            continue
        known.append(same)
        name = {PLAIN: PLAIN_LABEL, RECIPE: RECIPE_LABEL}.get(kind, "")
        label = ", ".join(filter(None, [name, values_text(differing)]))
        learns, mask = _mask(config, differing, swept)
        found.append(Variant(label, label, kind, differing, (changed,), learns, mask))
    return found


def _mask(
    config: MergeConfiguration, values: Mapping[str, Any], swept: Sequence[Swept]
) -> tuple[MergeConfiguration | None, str]:
    """Return the recipe that a mask is learned by, None for a given one, and what it is called."""
    given = values.get(MASK) or (config.parameters or {}).get(MASK)
    deciding = {s.name: values[s.name] for s in swept if s.relearns and s.name in values}
    if given:
        return None, str(given)
    return with_values(config, deciding), values_text(deciding) or RECIPE_LABEL


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
