"""The models of a sweep: recipes with other values of their parameters, checked one by one."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import TypeAdapter, ValidationError

from ...common.digests import json_digest
from ...fusion.fusion_methods import known_fusions
from ...recipe.blocks import parameter_blocks, plain
from ...recipe.schema import nearest
from ...recipe.settings import METHOD_NAME, parameters

BASE, MODEL, PLAIN, RECIPE, VARIANT = "base", "model", "plain", "recipe", "variant"
BASE_LABEL, PLAIN_LABEL, RECIPE_LABEL = "aligned base", "plain fusion", "the recipe"
WEIGHT, FUSION, KIND, MASK = "weight", "fusion", "mask_kind", "mask"
# Parameters of somf that a merge applies, whatever mask was learned.
APPLIED = (FUSION, MASK, KIND, "mask_rescale")
# What a merge reads too although it decides the mask: applied alone where the mask is given.
_APPLIED_TO_GIVEN = ("seed", "include", "exclude")
_USUAL: dict[str, tuple[Any, ...]] = {
    WEIGHT: (0.5, 0.75, 1.0, 1.25),
    "lambda": (0.5, 0.75, 1.0, 1.25),
    "density": (0.2, 0.5, 0.8, 1.0),
    "temperature": (0.25, 0.5, 1.0),
    "sft_weight": (0.0, 0.3, 1.0),
    "utility_weight": (0.3, 1.0, 3.0),
    "learning_rate": (0.01, 0.03, 0.1),
    "max_steps": (60, 120, 240),
    "seed": (0, 1, 2),
}


@dataclass(frozen=True)
class Swept:
    """A parameter that takes several values.

    Attributes:
        name: of the parameter.
        values: the values; of ``weight``, factors on all models' weights.
        relearns: whether each value needs a mask of its own.
        fuses: whether the merge without a mask depends on it too.
    """

    name: str
    values: tuple[Any, ...]
    relearns: bool
    fuses: bool


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


def swept_parameters(
    over: Mapping[str, Sequence[Any]], config: MergeConfiguration
) -> tuple[list[Swept], list[str]]:
    """Return the swept parameters, and everything that is wrong with them, a sentence each.

    Args:
        over: values by parameter; the usual ones for those without.
        config: the recipe, of any merge method.
    """
    is_somf = config.merge_method == METHOD_NAME
    own = {parameter.name: parameter for parameter in parameters()} if is_somf else {}
    methods = [registry.get(config.merge_method)]
    if is_somf:
        fusions = over.get(FUSION) or [(config.parameters or {}).get(FUSION, own[FUSION].default)]
        known = known_fusions()
        methods = [known[str(name)] for name in fusions if str(name) in known]
    theirs = {spec.name: spec for method in methods for spec in method.spec.parameters}
    known_names = [method.spec.name for method in methods]
    values: dict[str, tuple[Any, ...]] = {}
    problems: list[str] = []
    for name, given in over.items():
        if name.endswith("_eval"):
            problems.append(
                f"--over {name}: is what merges are measured on, not how one is made; all merges "
                "are measured on the same"
            )
        elif name not in own and name not in theirs:
            hint = nearest(name, [*own, *theirs])
            names = " nor ".join(["neither somf", *known_names] if is_somf else known_names)
            has = "has it" if is_somf else "doesn't have it"
            problems.append(f"--over {name}: unknown parameter{hint}; {names} {has}")
        else:
            kind = own[name].value_type if name in own else theirs[name].value_type
            text = own[name].type_text if name in own else getattr(kind, "__name__", str(kind))
            text = "a number > 0" if name == WEIGHT else text
            values[name], wrong = _read(name, given or _usual(name, kind), kind, text)
            problems += wrong
    fusing = [name for name in values if name not in own or name == FUSION]
    learning: list[str] = []
    if is_somf and not problems:
        learning = _learning(values, fusing, config)
        problems += _useless(values, learning, config)
    swept = [Swept(n, of, n in learning, n in fusing) for n, of in values.items()]
    return swept, problems


def _learning(
    values: Mapping[str, Sequence[Any]], fusing: Sequence[str], config: MergeConfiguration
) -> list[str]:
    """Return the names of the parameters that decide a mask."""
    given = config.parameters or {}
    kinds = values.get(KIND) or (given.get(KIND),)
    applied = [*fusing, *APPLIED, *(["temperature"] if set(kinds) == {"sampled"} else [])]
    applied += _APPLIED_TO_GIVEN if MASK in {*given, *values} else []
    return [name for name in values if name not in applied]


def _useless(
    values: Mapping[str, Any], learning: Sequence[str], config: MergeConfiguration
) -> Iterator[str]:
    """Yield a sentence for each parameter whose values change nothing."""
    there = {*(config.parameters or {}), *values}
    for name in learning if MASK in there else ():
        yield (
            f"--over {name}: decides how a mask is learned, and the recipe's is given "
            "(parameters.mask): give safety_dataset instead"
        )
    if "utility_weight" in values and "utility_dataset" not in there:
        yield (
            "--over utility_weight: changes nothing without a utility term; give "
            "parameters.utility_dataset"
        )


def _usual(name: str, kind: Any) -> tuple[Any, ...]:
    """Return the values that a parameter takes where none is given; there may be none."""
    if name in _USUAL:
        return _USUAL[name]
    schema = TypeAdapter(kind).json_schema()
    return (False, True) if schema.get("type") == "boolean" else tuple(schema.get("enum", ()))


def _read(
    name: str, given: Sequence[Any], kind: Any, type_text: str
) -> tuple[tuple[Any, ...], list[str]]:
    """Return values in their parameter's type, and a sentence for each that can't be read."""
    found: list[Any] = []
    problems = []
    if not given:
        problems.append(f"--over {name}: has no usual values; name some: --over {name}=VALUE,...")
    for value in given:
        try:
            read = TypeAdapter(kind).validate_strings(str(value))
        except ValidationError:
            read = None
        is_infinite = isinstance(read, float) and not math.isfinite(read)
        if read is None or is_infinite or (name == WEIGHT and read <= 0):
            problems.append(f"--over {name}: {value!r} is not {type_text}")
        else:
            found.append(read)
    return tuple(dict.fromkeys(found)), problems


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
        # Nothing is learned.
        for _, block, _ in parameter_blocks(changed):
            for name in ("safety_dataset", "learn"):
                block.pop(name, None)  # type: ignore[attr-defined]
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
