"""What is swept: the parameters behind ``--over`` with their values, checked one by one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from pydantic import TypeAdapter, ValidationError

from ..declared import Parameter
from ..fusion_methods import known_fusions
from ..recipe import parameters
from ..value_check import nearest

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
# A factor on all weights.
_FACTOR = "a number > 0"


@dataclass(frozen=True)
class Swept:
    """A parameter that takes several values.

    Attributes:
        name: of the parameter.
        values: that it takes; of ``weight``, factors on all models' weights.
        relearns: whether each value asks for a mask of its own.
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
    """Return what is swept, and everything that is wrong with it, a sentence each.

    Args:
        over: values by parameter; the defaults for those without.
        config: the recipe.
    """
    problems = [] if over else ["nothing is swept: name a parameter with --over KEY=VALUE,..."]
    own = {parameter.name: parameter for parameter in parameters()}
    fusions = _fusions(over, config, own[FUSION].default)
    theirs = {spec.name: spec for fusion in fusions for spec in fusion.spec.parameters}
    named = " nor ".join(fusion.spec.name for fusion in fusions)
    found = []
    for name, given in over.items():
        if name.endswith("_eval"):
            problems.append(
                f"--over {name}: is what merges are measured on, not how one is made; all points "
                "are measured on the same"
            )
            continue
        if name in own:
            default = _defaults(name, own[name].value_type)
            values = _read(name, given or default, own[name].value_type, own[name].type_text)
        elif name in theirs:
            kind = theirs[name].value_type
            told = _FACTOR if name == WEIGHT else getattr(kind, "__name__", str(kind))
            values = _read(name, given or _defaults(name, kind), kind, told)
        else:
            problems.append(
                f"--over {name}: unknown parameter{nearest(name, [*own, *theirs])}; neither somf "
                f"nor {named or 'the fusion'} has it"
            )
            continue
        problems += [value for value in values if isinstance(value, _Wrong)]
        fuses = name not in own or name == FUSION
        found.append(Swept(name, tuple(dict.fromkeys(values)), False, fuses))
    if problems:
        return found, list(map(str, problems))
    return _classified(found, config, own)


def _classified(
    swept: list[Swept], config: MergeConfiguration, own: Mapping[str, Parameter]
) -> tuple[list[Swept], list[str]]:
    """Tell what asks for a mask of its own from what is applied; refuse what changes nothing."""
    given = config.parameters or {}
    has_mask = MASK in given or any(s.name == MASK for s in swept)
    has_utility = "utility_dataset" in {*given, *(s.name for s in swept)}
    kinds = next((s.values for s in swept if s.name == KIND), (given.get(KIND, own[KIND].default),))
    applied = list(APPLIED)
    if kinds == ("sampled",):
        applied.append(TEMPERATURE)
    if has_mask:
        applied += _APPLIED_TO_GIVEN
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


def _fusions(
    over: Mapping[str, Sequence[Any]], config: MergeConfiguration, default: str
) -> list[MergeMethod]:
    """Return the fusions that points have, those that are known."""
    named = over.get(FUSION) or [(config.parameters or {}).get(FUSION, default)]
    known = known_fusions()
    return [known[str(name)] for name in named if str(name) in known]


class _Wrong(str):
    """A sentence that stands for a value that can't be read."""


def _defaults(name: str, kind: Any) -> tuple[Any, ...]:
    """Return the values that a parameter takes where none is given; there may be none."""
    if name in DEFAULTS:
        return DEFAULTS[name]
    schema = TypeAdapter(kind).json_schema()
    if schema.get("type") == "boolean":
        return (False, True)
    return tuple(schema.get("enum", ()))


def _read(name: str, given: Sequence[Any], kind: Any, told: str) -> list[Any]:
    """Return values in their parameter's type, a sentence in place of what is none."""
    if not given:
        return [_Wrong(f"--over {name}: has no usual values; name some: --over {name}=VALUE,...")]
    found: list[Any] = []
    for value in given:
        try:
            read = TypeAdapter(kind).validate_strings(str(value))
        except ValidationError:
            read = None
        is_number = isinstance(read, float)
        if (
            read is None
            or (is_number and not math.isfinite(read))
            or (name == WEIGHT and read <= 0)
        ):
            found.append(_Wrong(f"--over {name}: {value!r} is not {told}"))
        else:
            found.append(read)
    return found
