"""The places of a mergekit recipe where parameters and models stand."""

from collections.abc import Iterator, Mapping
from typing import Any


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
