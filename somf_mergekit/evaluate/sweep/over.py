"""The parameters behind ``--over`` and their values, checked one by one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import TypeAdapter, ValidationError

from ...fusion.fusion_methods import known_fusions
from ...recipe.schema import Parameter, nearest
from ...recipe.settings import METHOD_NAME, parameters

WEIGHT, FUSION, KIND, TEMPERATURE, MASK = "weight", "fusion", "mask_kind", "temperature", "mask"
# Parameters of somf that a merge applies, whatever mask was learned.
APPLIED = (FUSION, MASK, KIND, "mask_rescale")
# What a merge reads too although it decides the mask: applied alone where the mask is given.
_APPLIED_TO_GIVEN = ("seed", "include", "exclude")
DEFAULTS: dict[str, tuple[Any, ...]] = {
    WEIGHT: (0.5, 0.75, 1.0, 1.25),
    "lambda": (0.5, 0.75, 1.0, 1.25),
    "density": (0.2, 0.5, 0.8, 1.0),
    TEMPERATURE: (0.25, 0.5, 1.0),
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


def parsed_over(texts: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values in ``KEY=V1,V2`` by key, none for ``KEY`` alone, and what is wrong."""
    found: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        values = [value.strip() for value in rest.split(",")] if equals else []
        if not key or (equals and not all(values)):
            problems.append(f"--over {text}: expected KEY or KEY=VALUE,VALUE,...")
        elif key in found:
            problems.append(f"--over {text}: {key} is swept already; put all its values into one")
        else:
            found[key] = values
    return found, problems


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
        given = over.get(FUSION) or [(config.parameters or {}).get(FUSION, own[FUSION].default)]
        known = known_fusions()
        methods = [known[str(name)] for name in given if str(name) in known]
    theirs = {spec.name: spec for method in methods for spec in method.spec.parameters}
    named = " nor ".join(["neither somf"] * is_somf + [method.spec.name for method in methods])
    found, problems = [], []
    for name, given in over.items():
        if name.endswith("_eval"):
            problems.append(
                f"--over {name}: is what merges are measured on, not how one is made; all merges "
                "are measured on the same"
            )
        elif name not in own and name not in theirs:
            hint = nearest(name, [*own, *theirs])
            verb = "has it" if is_somf else "doesn't have it"
            problems.append(f"--over {name}: unknown parameter{hint}; {named} {verb}")
        else:
            kind = own[name].value_type if name in own else theirs[name].value_type
            type_text = own[name].type_text if name in own else getattr(kind, "__name__", str(kind))
            type_text = "a number > 0" if name == WEIGHT else type_text
            values, wrong = _read(name, given or _defaults(name, kind), kind, type_text)
            problems += wrong
            fuses = name not in own or name == FUSION
            found.append(Swept(name, tuple(dict.fromkeys(values)), False, fuses))
    if problems or not is_somf:
        return found, problems
    return _classified(found, config, own)


def _classified(
    swept: list[Swept], config: MergeConfiguration, own: Mapping[str, Parameter]
) -> tuple[list[Swept], list[str]]:
    """Mark the parameters that decide the mask; refuse those that change nothing."""
    given = config.parameters or {}
    has_mask = MASK in given or any(s.name == MASK for s in swept)
    has_utility = "utility_dataset" in {*given, *(s.name for s in swept)}
    kinds = next((s.values for s in swept if s.name == KIND), (given.get(KIND, own[KIND].default),))
    applied = [*APPLIED, *([TEMPERATURE] if kinds == ("sampled",) else [])]
    applied += _APPLIED_TO_GIVEN if has_mask else []
    found, problems = [], []
    for one in swept:
        relearns = not (one.fuses or one.name in applied)
        if relearns and has_mask:
            problems.append(
                f"--over {one.name}: decides how a mask is learned, and the recipe's is given "
                "(parameters.mask): give safety_dataset instead"
            )
        if one.name == "utility_weight" and not has_utility:
            problems.append(
                "--over utility_weight: changes nothing without a utility term; give "
                "parameters.utility_dataset"
            )
        found.append(replace(one, relearns=relearns))
    return found, problems


def _defaults(name: str, kind: Any) -> tuple[Any, ...]:
    """Return the values that a parameter takes where none is given; there may be none."""
    if name in DEFAULTS:
        return DEFAULTS[name]
    schema = TypeAdapter(kind).json_schema()
    if schema.get("type") == "boolean":
        return (False, True)
    return tuple(schema.get("enum", ()))


def _read(
    name: str, given: Sequence[Any], kind: Any, type_text: str
) -> tuple[list[Any], list[str]]:
    """Return values in their parameter's type, and a sentence for each that can't be read."""
    if not given:
        return [], [f"--over {name}: has no usual values; name some: --over {name}=VALUE,..."]
    found: list[Any] = []
    problems = []
    for value in given:
        try:
            read = TypeAdapter(kind).validate_strings(str(value))
        except ValidationError:
            read = None
        infinite = isinstance(read, float) and not math.isfinite(read)
        if read is None or infinite or (name == WEIGHT and read <= 0):
            problems.append(f"--over {name}: {value!r} is not {type_text}")
        else:
            found.append(read)
    return found, problems
