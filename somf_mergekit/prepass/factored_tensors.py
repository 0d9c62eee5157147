"""What a merge of adapters is made of where their task vectors stay factored."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Executor
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from ..common.errors import RecipeError, few
from ..common.machine import FACTORED
from ..common.model_classes import empty_model, model_class, stored_slices
from ..fusion.fuse import SUMS
from ..fusion.groups import not_finite
from ..fusion.masked_fusion import WeightedSum, weighted_sum
from ..fusion.merges import FactoredMerge, LoadedTensor, LowRank
from ..learner.few_bits import FewBits, weights_for_few_bits
from ..recipe.low_rank import NotFactoredError, low_rank_changes
from .given_masks import Given, starting_logits
from .headers import tensor_shapes
from .plan import PlannedMerge, gather_task, mask_name, task_parameters, with_fields

# Of each tensor by name, what the models that change it add to the base's.
Changes = dict[str, dict[ModelReference, LowRank]]


def changes_or_why(planned: PlannedMerge) -> tuple[Changes | None, str]:
    """Return what adapters change where they can stay factored, else why they can't.

    Raises:
        RecipeError: they can't, and the engine for it was asked for.
    """
    options = planned.options.machine
    if options.engine not in (None, FACTORED):
        return None, ""
    try:
        return factored_changes(planned), ""
    except NotFactoredError as error:
        if options.engine or options.base_precision:
            of_base = "--base-precision (SOMF_BASE_PRECISION)"
            asked_for = of_base if options.base_precision else "--engine (SOMF_ENGINE)"
            raise RecipeError(
                f"the factored engine can't learn this mask: {error}. Leave {asked_for} out: "
                "another one is found"
            ) from error
        has_adapters = any(model.lora for model in planned.models)
        return None, str(error) if has_adapters else ""


def factored_changes(planned: PlannedMerge) -> Changes:
    """Return what the adapters of a merge change, factored.

    Raises:
        NotFactoredError: a mask can't be learned from that alone.
    """
    base = planned.base_model
    models = [model for model in planned.models if model != base]
    full = [m for m in models if base.lora or not _is_adapter_of(m, base)]
    if full:
        raise NotFactoredError(
            f"{few([str(model) for model in full])} is no adapter on the base model"
        )
    if set(planned.learners) != set(models):
        raise NotFactoredError("not every model learns its mask")
    for weight, task in planned.text_tensors:
        parameters = task_parameters(task)
        if parameters["fusion"] not in SUMS:
            raise NotFactoredError(f"the fusion {parameters['fusion']} needs whole task vectors")
        if _weights(task, parameters).of_base != 1:
            raise NotFactoredError(f"the fusion scales the base's {weight.name}")
    _, places = _model_and_places(planned)
    found = {model: low_rank_changes(model, planned.options) for model in models}
    own = model_class(base, planned.options.trust_remote_code)
    of_tokens = {w.name for w, _ in planned.tensors if w.vocabulary_axis is not None}
    apart = {place for name, place in places.items() if name not in of_tokens} - own.tied.keys()
    for model in models:
        if others := found[model].keys() & own.text - apart:
            raise NotFactoredError(f"{model.lora} changes {few(others)}, a joined or tied weight")
    changes: Changes = {}
    for weight, task in planned.text_tensors:
        place = places.get(weight.name, "")
        if own_changes := {m: found[m][place] for m in models if place in found[m]}:
            changes[weight.name] = own_changes
        is_learned = weight.name in changes and planned.may_get_mask(weight.name)
        if is_learned and task.parameters["granularity"] == "weight":
            raise NotFactoredError("a mask with an entry for each weight needs their gradients")
    return changes


def few_bits_of(planned: PlannedMerge, precision: str) -> tuple[FewBits, set[str]]:
    """Return which weights of a merge's model can be in few bits, and the tensors that they are."""
    model, places = _model_and_places(planned)
    weights = weights_for_few_bits(model)
    of_merge = {name: place for name, place in places.items() if place in weights}
    return FewBits(precision, frozenset(of_merge.values())), set(of_merge)


def _model_and_places(planned: PlannedMerge) -> tuple[Any, dict[str, str]]:
    """Return the model of a merge without its weights, and which of them each tensor is.

    Weights that are joined of several tensors are left out: these are filled one by one.
    """
    model = empty_model(planned.out_config, planned.options.trust_remote_code)
    slices = stored_slices(model, tensor_shapes(planned))
    return model, {name: place.name for name, place in slices.items() if not place.steps}


def factored_tensors(
    planned: PlannedMerge, given: Given, changes: Changes
) -> Iterator[LoadedTensor]:
    """Yield what ``task_vectors.loaded_tensors`` does, with task vectors that stay factored.

    Args:
        planned: the merge.
        given: masks that learning starts from.
        changes: of its adapters, see ``factored_changes``.

    Raises:
        RecipeError: a weight is NaN or infinite.
    """
    by_task = {_reading(task): (task.output_weight, task) for _, task in planned.text_tensors}
    executor = Executor(targets=list(by_task), math_device="cpu", storage_device="cpu")
    for gathered, tensors in executor.run(quiet=planned.options.quiet, desc="Reading the base"):
        weight, task = by_task[gathered]
        if planned.base_model not in tensors:
            continue
        base = tensors[planned.base_model].detach()
        own, parameters = changes.get(weight.name, {}), task_parameters(task)
        entry = TensorEntry(planned.base_model, base, True)
        broken = not_finite(TensorGroup((entry,), TensorMetadata.from_weight_info(weight)))
        # Attention's mask in older checkpoints has infinite entries.
        if broken and (own or torch.isnan(base.float()).any()):
            raise RecipeError(broken)
        merge, shape = None, tuple(base.shape)
        learned = planned.learned([m for m in task.model_order if m != task.base_model])
        if own:
            weights = _weights(task, parameters).of_task_vectors
            merge = FactoredMerge.of(own, weights, learned, shape)
        own_given = given if planned.may_get_mask(weight.name) else {}
        yield LoadedTensor(
            name=weight.name,
            shape=shape,
            base=base,
            merge=merge,
            learned=learned if merge else (),
            starts=starting_logits(own_given, learned, mask_name(task)),
            changed=bool(own),
            parameters=parameters,
            vocabulary_axis=weight.vocabulary_axis,
        )


def _is_adapter_of(model: ModelReference, base: ModelReference) -> bool:
    places = [(os.path.realpath(m.model.path), m.model.revision) for m in (model, base)]
    return model.lora is not None and places[0] == places[1]


def _weights(task: ExecuteMergeMethodTask, parameters: Mapping[str, Any]) -> WeightedSum:
    """Return the sum that the fusion makes of a tensor, of which nothing is read for it."""
    entries = tuple(
        TensorEntry(model, torch.zeros(1), model == task.base_model) for model in task.model_order
    )
    return weighted_sum(
        TensorGroup(entries, TensorMetadata.from_weight_info(task.output_weight)), parameters
    )


def _reading(task: ExecuteMergeMethodTask) -> Any:
    """Return the task that reads the base's tensor alone, where none aligns vocabularies."""
    gathered = gather_task(task)
    if gathered is not task.gather_tensors:
        # No adapter changes it, and all models have the base's tokens.
        return task.gather_tensors
    alone = {task.base_model: gathered.weight_info[task.base_model]}
    return with_fields(gathered, weight_info=ImmutableMap(alone))
