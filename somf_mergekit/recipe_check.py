"""What is wrong with a recipe, as far as its text tells; all of it at once."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .recipe import Parameter, Settings, parameters, pattern_text


def recipe_problems(config: Any, fusion_parameters: Mapping[str, Iterable[str]]) -> list[str]:
    """Return everything that is wrong with a recipe as far as its text tells, a sentence each.

    Args:
        config: a mergekit MergeConfiguration.
        fusion_parameters: for each known fusion, the names of its own parameters.
    """
    top = dict(config.parameters or {})
    problems = []
    if config.base_model is None:
        problems.append(
            "base_model is missing: somf needs the aligned model that the specialists were "
            "fine-tuned from"
        )
    fusion = top.get("fusion", Settings.model_fields["fusion"].default)
    own = {parameter.name: parameter for parameter in parameters()}
    theirs = set(fusion_parameters.get(fusion, ())) if isinstance(fusion, str) else set()
    if isinstance(fusion, str) and fusion not in fusion_parameters:
        nearest = _nearest(fusion, fusion_parameters)
        problems.append(
            f"parameters.fusion: {fusion!r} is not supported{nearest}; known are "
            f"{', '.join(fusion_parameters)}"
        )
    for place, settings in _parameter_blocks(config):
        for key, value in settings.items():
            where = f"{place}.{key}"
            if key in own:
                problems += _own_problems(own[key], value, where, place == "parameters")
            elif key not in theirs and theirs:
                problems.append(f"{where}: unknown parameter{_nearest(key, [*own, *theirs])}")
    if "mask" in top and "safety_dataset" in top:
        problems.append(
            "parameters.mask and parameters.safety_dataset are both given: a mask is already "
            "learned, so remove one of them"
        )
    if "mask" not in top and "safety_dataset" not in top:
        problems.append(
            "parameters.safety_dataset is missing: name preference pairs to learn the mask on, or "
            "a learned mask with parameters.mask"
        )
    return problems


def text_problems(source: Mapping[str, Any], config_type: Any) -> list[str]:
    """Return the top-level keys of a recipe that mergekit would drop without a word."""
    known = [*config_type.model_fields, "name"]
    return [f"{key}: unknown key{_nearest(str(key), known)}" for key in source if key not in known]


def _own_problems(parameter: Parameter, value: Any, where: str, at_top: bool) -> Iterator[str]:
    if parameter.is_pattern:
        value = pattern_text(value)
    if not parameter.per_tensor:
        if not at_top:
            yield f"{where}: belongs to the recipe as a whole; move it to the top `parameters:`"
            return
        if not isinstance(value, (bool, int, float, str)):
            yield f"{where}: takes one value for all tensors, no list and no filter"
            return
    adapter = TypeAdapter(parameter.value_type)
    for leaf in _leaves(value):
        try:
            # pydantic takes true for 1; 1e-3, which YAML reads as text, is a number all the same.
            if isinstance(leaf, bool):
                raise ValueError("a truth value")
            adapter.validate_python(leaf)
        except (ValidationError, ValueError):
            yield f"{where}: {leaf!r} is not {parameter.type_text}"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif hasattr(value, "filter"):
        yield from _leaves(value.value)
    else:
        yield value


def _parameter_blocks(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each `parameters:` block of a recipe with the place where it stands."""
    if config.parameters:
        yield "parameters", config.parameters
    for index, model in enumerate(config.models or []):
        if model.parameters:
            yield f"models[{index}].parameters", model.parameters
    yield from _slice_blocks("", config.slices)
    for name, module in (config.modules or {}).items():
        if module.parameters:
            yield f"modules.{name}.parameters", module.parameters
        for index, model in enumerate(module.models or []):
            if model.parameters:
                yield f"modules.{name}.models[{index}].parameters", model.parameters
        yield from _slice_blocks(f"modules.{name}.", module.slices)


def _slice_blocks(prefix: str, slices: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, part in enumerate(slices or []):
        if part.parameters:
            yield f"{prefix}slices[{index}].parameters", part.parameters
        for number, source in enumerate(part.sources):
            if source.parameters:
                yield f"{prefix}slices[{index}].sources[{number}].parameters", source.parameters


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
