"""What is wrong with a recipe as its plan says: values are resolved per tensor."""

from collections.abc import Iterable, Iterator
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from ..common.errors import few, first_line, log_traceback
from ..common.model_classes import class_of, empty_model, stored_slices
from ..fusion.fusion_methods import known_fusions
from ..recipe.blocks import parameter_blocks
from ..recipe.fusion_check import fusing_problem
from .headers import planned_tensors
from .plan import PlannedMerge, gather_task, mask_name, task_parameters


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


def unread_problems(tensors: Iterable[tuple[WeightInfo, ExecuteMergeMethodTask]]) -> list[str]:
    """Return a sentence where mergekit takes a tensor from fewer models than its slice has.

    Of the tensors after the last layer it reads as many models as the first slice has sources.
    """
    for weight, task in tensors:
        sources = gather_task(task).weight_info
        unread = [str(model) for model in task.model_order if model not in sources]
        if unread:
            return [
                f"slices: mergekit would make {weight.name} without {', '.join(unread)}, since the "
                "first slice has fewer sources than the last: give it as many, for example a model "
                "with `parameters: {weight: 0}`"
            ]
    return []


def unused_filters(config: MergeConfiguration, planned: PlannedMerge) -> list[str]:
    """Return a sentence for each value with a filter that counts for no tensor.

    Args:
        config: the recipe as it was given.
        planned: its plan.
    """
    names = {weight.name for weight, _ in planned.tensors}
    sources = (gather_task(task).weight_info for _, task in planned.tensors)
    names |= {str(source.name) for found in sources for source in found.values()}
    problems = []
    for place, settings, _ in parameter_blocks(config):
        for key, value in settings.items():
            problems += [f"{place}.{key}: {problem}" for problem in _unreached(value, names)]
    return problems


def learning_problem(planned: PlannedMerge) -> str | None:
    """Return a sentence where no mask can be learned for a merge as it is planned.

    The merge without task vectors must be the base model, and transformers must make a causal
    language model of it that has the tensors of the merge.
    """
    example = None
    for _, task in planned.tensors:
        name = task.output_weight.name
        if task.base_model != planned.base_model or mask_name(task) != name:
            example = f"{name} is made of {mask_name(task)} of {task.base_model}"
            break
    if example is None and planned.out_config is not None:
        layers = planned.out_config.get_text_config().num_hidden_layers
        base = planned.base_model.config(trust_remote_code=planned.options.trust_remote_code)
        if layers != base.get_text_config().num_hidden_layers:
            example = f"it has {layers} layers, the base {base.get_text_config().num_hidden_layers}"
    if example is None:
        return _class_problem(planned)
    return (
        f"a mask can't be learned for this merge, whose output isn't a model of the base's shape: "
        f"{example}. A learned mask can still be applied with the parameter `mask`"
    )


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
        learned = planned.learned(models) if planned.settings.max_steps != 0 else ()
        problem = fusing_problem(values, models, learned)
        if problem:
            yield f"parameters.fusion: {problem}"


def _unreached(value: Any, names: set[str]) -> Iterator[str]:
    """Yield why values with filters count for no tensor: mergekit takes the first that matches."""
    left, is_final = set(names), False
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, ConditionalParameter):
            continue
        is_for_all = item.filter in (None, "*")
        matching = names if is_for_all else {name for name in names if item.filter in name}
        named = f"the value {item.value!r}" if is_for_all else f"the filter {item.filter!r}"
        if not matching:
            yield (
                f"no tensor has {item.filter!r} in its name; a filter is a part of a name such as "
                f"{min(names, key=len)!r}"
            )
        elif is_final or not (is_for_all or matching & left):
            yield (
                f"{named} is never reached: mergekit takes the first filter that a name matches, "
                "and one above it has all of its tensors; move it up"
            )
        left -= matching
        is_final |= is_for_all


def _class_problem(planned: PlannedMerge) -> str | None:
    """Return a sentence where transformers makes no model that writes text of the merge."""
    trust = planned.options.trust_remote_code
    named = planned.base_model.config(trust_remote_code=trust).architectures[0]
    ways = "Give models that write text, or a learned mask with the parameter `mask`"
    try:
        made = empty_model(planned.out_config, trust, None)
        own = class_of(made)
    except ImportError as error:
        why = f"its configuration asks for what is not installed: {first_line(error)}"
        ways = "Install it, or take it (attn_implementation) out of the base's config.json"
    except Exception as error:  # a list of all configurations, or an error of a stranger's code
        log_traceback(error)
        why = "transformers can't load it as a model that writes text"
    else:
        shapes = {name: tensor.shape for name, tensor in planned_tensors(planned).items()}
        placed = {place.name for place in stored_slices(made, shapes).values()}
        placed |= {name for tied in placed for name in own.tied.get(tied, ())}
        lacking = (own.parameters & own.text) - placed
        if made.get_output_embeddings() is None:
            why = "it has no output head to write text with"
        elif lacking:
            why = (
                f"{own.name} needs {few(lacking)}, which the merge does not write as it loads them"
            )
        else:
            return None
    return (
        f"a mask can't be learned for this merge: the base {planned.base_model} is a {named}, and "
        f"{why.removesuffix('.')}. {ways}"
    )
