"""The checkpoints of a planned merge, read through mergekit's own loaders."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from safetensors import safe_open
from torch import Tensor

from .errors import RecipeError
from .fusions import is_linear
from .method import is_shared_buffer, not_finite
from .recipe import Settings, may_get_mask, recipe_settings
from .weights import MergedWeight, merged_weight

_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class PlannedMerge:
    """A merge as mergekit planned it.

    Attributes:
        config: the recipe, as mergekit rewrote it.
        recipe: the recipe as it was given, YAML.
        options: mergekit's options.
        base_model: the aligned model.
        out_config: transformers configuration of the merged model.
        tensors: each tensor that will be written, with the task that makes it.
        tokenizer_task: mergekit's task that builds the tokenizer, where the recipe asks for one.
    """

    config: MergeConfiguration
    recipe: str
    options: MergeOptions
    base_model: ModelReference
    out_config: Any
    tensors: tuple[tuple[WeightInfo, ExecuteMergeMethodTask], ...]
    tokenizer_task: Any

    @cached_property
    def settings(self) -> Settings:
        """The recipe's own parameters."""
        return recipe_settings(self.config)

    @cached_property
    def models(self) -> list[ModelReference]:
        """The base and the fine-tuned models, in the plan's order."""
        found = [self.base_model]
        for _, task in self.tensors:
            found += [model for model in task.model_order if model not in found]
        return found

    def may_get_mask(self, name: str) -> bool:
        """Whether the recipe's patterns let this tensor have a mask."""
        return may_get_mask(name, self.settings.include, self.settings.exclude)


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the merge.

    Attributes:
        name: in the merged checkpoint.
        base: the base model's tensor, in the recipe's dtype.
        weight: the merged weight as a function of the mask; None for what is no number to learn
            on (buffers of integers, or of infinity in every model).
        changed: whether any model differs from the base.
        parameters: the somf method's parameters as mergekit resolved them for this tensor.
        vocabulary_axis: the axis of tokens, if there is one.
    """

    name: str
    base: Tensor
    weight: MergedWeight | None
    changed: bool
    parameters: dict[str, Any]
    vocabulary_axis: int | None


def loaded_tensors(planned: PlannedMerge) -> Iterator[LoadedTensor]:
    """Yield every tensor of the merge.

    Raises:
        RecipeError: a weight is NaN or infinite.
    """
    by_task = {task.gather_tensors: (weight, task) for weight, task in planned.tensors}
    executor = Executor(targets=list(by_task), math_device="cpu", storage_device="cpu")
    for gathered, tensors in executor.run(quiet=planned.options.quiet, desc="Reading task vectors"):
        weight, task = by_task[gathered]
        entries = tuple(
            TensorEntry(id=model, tensor=tensors[model], is_base=model == task.base_model)
            for model in task.model_order
            if model in tensors
        )
        if not entries or not any(entry.is_base for entry in entries):
            continue
        group = TensorGroup(entries, TensorMetadata.from_weight_info(weight))
        group.validate_tensors()
        shared = is_shared_buffer(group)
        broken = not_finite(group)
        if broken and not shared:
            raise RecipeError(broken)
        base = group.base.tensor
        parameters = task_parameters(task)
        yield LoadedTensor(
            name=weight.name,
            base=base,
            weight=None
            if shared or not base.is_floating_point()
            else merged_weight(group, parameters),
            changed=any(not torch.equal(entry.tensor, base) for entry in group.non_base),
            parameters=parameters,
            vocabulary_axis=weight.vocabulary_axis,
        )


def task_parameters(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """Return a task's parameters as ``fusions.fused`` takes them: those per model as mappings."""
    values = dict(task.parameters.items())
    for model, own in task.input_parameters.items():
        for name, value in own.items():
            values.setdefault(name, {})[model] = value
    return values


def source_names(task: ExecuteMergeMethodTask) -> set[str]:
    """Return the names that a tensor has in the models it is made of."""
    return {str(source.name) for source in _gather_task(task).weight_info.values()}


def mask_name(task: ExecuteMergeMethodTask) -> str:
    """Return the name under which a mask for this tensor is kept: its name in the base."""
    return str(_gather_task(task).weight_info[task.base_model].name)


def learning_problem(planned: PlannedMerge) -> str | None:
    """Return a sentence where the merge without task vectors would not be the base model."""
    example = None
    for weight, task in planned.tensors:
        if task.base_model != planned.base_model or mask_name(task) != weight.name:
            example = f"{weight.name} is made of {mask_name(task)} of {task.base_model}"
            break
    if example is None and planned.out_config is not None:
        layers = planned.out_config.get_text_config().num_hidden_layers
        base = planned.base_model.config(trust_remote_code=planned.options.trust_remote_code)
        if layers != base.get_text_config().num_hidden_layers:
            example = f"it has {layers} layers, the base {base.get_text_config().num_hidden_layers}"
    if example is None:
        return None
    return (
        f"a mask can't be learned for this merge, whose output is no model of the base's shape: "
        f"{example}. A learned mask can still be applied with the parameter `mask`"
    )


def checkpoint_problems(planned: PlannedMerge) -> list[str]:
    """Return what does not fit between the models, told from file headers alone."""
    problems = []
    missing: dict[ModelReference, list[str]] = {}
    for weight, task in planned.tensors:
        gathered = _gather_task(task)
        aligned = gathered is not task.gather_tensors
        shapes: dict[ModelReference, tuple[int, ...]] = {}
        for model, source in gathered.weight_info.items():
            found = _stored_tensor(model, source, planned.options)
            if found == "missing" and not source.optional:
                missing.setdefault(model, []).append(str(source.name))
            elif isinstance(found, tuple):
                shapes[model] = found
        base = shapes.get(task.base_model)
        for model, shape in shapes.items():
            if base is not None and not _fits(shape, base, weight, aligned):
                hint = (
                    "; with another vocabulary, add `tokenizer: {source: base}`"
                    if weight.vocabulary_axis is not None
                    else "; all models must come from the same base"
                )
                problems.append(
                    f"{weight.name}: shape {_shape_text(shape)} in {model}, {_shape_text(base)} in "
                    f"the base {task.base_model}{hint}"
                )
    problems += [
        f"{model}: its checkpoint has no {', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}, which mergekit's definition "
        "of the architecture asks for"
        for model, names in missing.items()
    ]
    return problems


@dataclass(frozen=True)
class PlannedMask:
    """A tensor of the merge that may get a mask.

    Attributes:
        kept_as: the name under which its mask is kept.
        shape: of the base's tensor; mergekit may still lengthen the vocabulary axis.
        granularity: of a mask that would be learned.
        kept_tensors: how many tensors of this shape learning keeps for the task vectors.
    """

    kept_as: str
    shape: tuple[int, ...]
    granularity: str
    kept_tensors: int


def planned_masks(planned: PlannedMerge) -> dict[str, PlannedMask]:
    """Return the tensors that may get a mask by their names in the merge, from file headers."""
    found = {}
    for weight, task in planned.tensors:
        if planned.may_get_mask(weight.name):
            source = _gather_task(task).weight_info[task.base_model]
            shape = _stored_tensor(task.base_model, source, planned.options)
            if isinstance(shape, tuple):
                found[weight.name] = PlannedMask(
                    kept_as=str(source.name),
                    shape=shape,
                    granularity=str(task.parameters["granularity"]),
                    kept_tensors=1 if is_linear(task_parameters(task)) else len(task.model_order),
                )
    return found


def vocabulary_aligned(planned: PlannedMerge) -> set[str]:
    """Return the tensors whose vocabulary axis mergekit aligns before merging."""
    return {w.name for w, task in planned.tensors if _gather_task(task) is not task.gather_tensors}


def content_fingerprint(model: ModelReference) -> str:
    """Return a SHA-256 over the contents of a model's weight files."""
    index = LoaderCache().get(model).index
    digest = hashlib.sha256()
    for file_name in sorted(set(index.tensor_paths.values())):
        with open(os.path.join(index.base_path, file_name), "rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _gather_task(task: ExecuteMergeMethodTask) -> GatherTensors:
    inner = task.gather_tensors
    return inner if isinstance(inner, GatherTensors) else inner.gather_tensors


def _stored_tensor(
    model: ModelReference, source: WeightInfo, options: MergeOptions
) -> tuple[int, ...] | str:
    """Return a tensor's shape from the file header, ``missing``, or ``unknown``."""
    index = LoaderCache().get(model).index
    names = [source.name, *(source.aliases or ()), *(source.tied_names or ())]
    for name in names:
        file_name = index.tensor_paths.get(name)
        if file_name is None:
            continue
        if not file_name.endswith(".safetensors"):
            return "unknown"
        with safe_open(os.path.join(index.base_path, file_name), framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())
    model_type = model.config(trust_remote_code=options.trust_remote_code).model_type
    stored = set(index.tensor_paths)
    if any(can_convert_checkpoint_keys(model_type, stored, name) for name in names):
        return "unknown"
    return "missing"


def _fits(shape: tuple[int, ...], base: tuple[int, ...], weight: WeightInfo, aligned: bool) -> bool:
    axis = weight.vocabulary_axis if aligned else None
    return len(shape) == len(base) and all(
        a == b or index == axis for index, (a, b) in enumerate(zip(shape, base, strict=True))
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
