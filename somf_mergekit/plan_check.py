"""Say what is wrong with a recipe as far as its plan tells: values are resolved per tensor."""

from collections.abc import Iterator
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods.base import ParameterScope

from .fusion_check import fusing_problem
from .fusion_methods import known_fusions
from .plan import PlannedMerge, source_names, task_parameters
from .recipe_blocks import parameter_blocks


def plan_problems(planned: PlannedMerge) -> list[str]:
    """Return what the chosen fusion requires and the recipe does not say, and what it refuses."""
    problems = []
    tried = set()
    for _, task in planned.tensors:
        values = task_parameters(task)
        missing = list(_missing(values, [m for m in task.model_order if m != task.base_model]))
        problems += missing
        if not missing and repr(values) not in tried:
            tried.add(repr(values))
            problems += _refused(planned, values, task)
    return list(dict.fromkeys(problems))


def unused_filters(config: MergeConfiguration, planned: PlannedMerge) -> list[str]:
    """Return a sentence for each ``filter`` of the recipe that is in no tensor's name.

    Args:
        config: the recipe as it was given.
        planned: its plan.
    """
    names = {weight.name for weight, _ in planned.tensors}
    names |= {name for _, task in planned.tensors for name in source_names(task)}
    problems = []
    for place, settings, _ in parameter_blocks(config):
        for key, value in settings.items():
            for pattern in _filters(value):
                if not any(pattern in name for name in names):
                    problems.append(
                        f"{place}.{key}: no tensor has {pattern!r} in its name; a filter is a part "
                        f"of a name such as {min(names, key=len)!r}"
                    )
    return problems


def _missing(values: dict[str, Any], models: list[Any]) -> Iterator[str]:
    fusion = values["fusion"]
    for spec in known_fusions()[fusion].spec.parameters:
        if not spec.required:
            continue
        value = values.get(spec.name)
        if spec.scope is ParameterScope.SHARED:
            if value is None or value == {}:
                yield (
                    f"{spec.name} is missing: {fusion} needs `{spec.name}: ...` under the recipe's "
                    "parameters"
                )
            continue
        yield from (
            f"{spec.name} is missing for {model}: {fusion} needs `parameters: {{{spec.name}: "
            "...}` under the model, or one for all under the recipe's parameters"
            for model in models
            if (value or {}).get(model) is None
        )


def _refused(planned: PlannedMerge, values: dict[str, Any], task: Any) -> Iterator[str]:
    if values["granularity"] == "tensor" and values["mask_rescale"] == "mean":
        yield (
            "parameters.granularity: a mask of one entry a tensor, divided by its mean, is always "
            "1; set `mask_rescale: none` with `granularity: tensor`"
        )
    models = [model for model in task.model_order if model != task.base_model]
    if models:
        learning = not planned.settings.mask and planned.settings.max_steps != 0
        problem = fusing_problem(values, models, learning)
        if problem:
            yield f"parameters.fusion: {problem}"


def _filters(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, ConditionalParameter) and item.filter not in (None, "*"):
            yield item.filter
