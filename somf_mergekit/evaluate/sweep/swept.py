"""The parameters that a sweep varies, and their values, checked one by one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import TypeAdapter, ValidationError

from ...fusion.fusion_methods import known_fusions
from ...recipe.settings import METHOD_NAME, parameters
from ...recipe.value_check import nearest

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
