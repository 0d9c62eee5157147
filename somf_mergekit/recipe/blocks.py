"""What stands where in a mergekit recipe: its content, parameters and models."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import ConfigYamlDumper
from pydantic import BaseModel


def recipe_text(config: Any) -> str:
    """Return a recipe as YAML, as mergekit would write it if it could write names with blanks."""
    return str(yaml.dump(plain(config), Dumper=ConfigYamlDumper)).rstrip()


def plain(value: Any) -> Any:
    """Return what a part of a recipe says as mappings, lists, texts and numbers, defaults left out.

    mergekit's own way fails on a model whose name has a blank.
    """
    if isinstance(value, ModelReference) and value.override_architecture is None:
        return str(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        said = {name: getattr(value, name) for name in fields}
        return {n: plain(item) for n, item in said.items() if item != fields[n].default}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def parameter_blocks(config: Any) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield each `parameters:` block of a recipe: where it stands, its content, and whether it is
    a single model's.
    """
    if config.parameters:
        yield "parameters", config.parameters, False
    for index, model in enumerate(config.models or []):
        if model.parameters:
            yield f"models[{index}].parameters", model.parameters, True
    yield from _slice_blocks("", config.slices)
    for name, module in (config.modules or {}).items():
        if module.parameters:
            yield f"modules.{name}.parameters", module.parameters, False
        for index, model in enumerate(module.models or []):
            if model.parameters:
                yield f"modules.{name}.models[{index}].parameters", model.parameters, True
        yield from _slice_blocks(f"modules.{name}.", module.slices)


def _slice_blocks(prefix: str, slices: Any) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    for index, part in enumerate(slices or []):
        if part.parameters:
            yield f"{prefix}slices[{index}].parameters", part.parameters, False
        for number, source in enumerate(part.sources):
            if source.parameters:
                place = f"{prefix}slices[{index}].sources[{number}].parameters"
                yield place, source.parameters, True


def model_blocks(config: Any) -> Iterator[tuple[str, list[Any], Any]]:
    """Yield each list of models of a recipe: where it stands, its items, and its base model."""

    def of_slices(prefix: str, slices: Any) -> Iterator[tuple[str, list[Any], Any]]:
        for index, part in enumerate(slices or []):
            base = part.base_model or config.base_model
            yield f"{prefix}slices[{index}].sources", part.sources, base

    if config.models:
        yield "models", config.models, config.base_model
    yield from of_slices("", config.slices)
    for name, module in (config.modules or {}).items():
        if module.models:
            yield f"modules.{name}.models", module.models, config.base_model
        yield from of_slices(f"modules.{name}.", module.slices)
