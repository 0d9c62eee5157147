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
from mergekit.merge_methods import PerInputValues, TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from safetensors import safe_open
from torch import Tensor

from .errors import RecipeError
from .method import fused, not_finite
from .recipe import Settings, may_get_mask, recipe_settings

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
        fused: D = Fuse(0; task vectors), float32 in the same shape; None where no model changed
            the tensor.
        parameters: the somf method's parameters as mergekit resolved them for this tensor.
        vocabulary_axis: the axis of tokens, if there is one.
    """

    name: str
    base: Tensor
    fused: Tensor | None
    parameters: dict[str, Any]
    vocabulary_axis: int | None


def loaded_tensors(planned: PlannedMerge) -> Iterator[LoadedTensor]:
    """Yield every tensor of the merge with its fused task vector.

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
        broken = not_finite(group)
        if broken:
            raise RecipeError(broken)
        parameters = _bound_parameters(task, group)
        yield LoadedTensor(
            name=weight.name,
            base=group.base.tensor,
            fused=_fused_task_vector(group, parameters),
            parameters=parameters,
            vocabulary_axis=weight.vocabulary_axis,
        )


def checkpoint_problems(planned: PlannedMerge) -> list[str]:
    """Return what does not fit between the models, told from file headers alone."""
    problems = []
    for weight, task in planned.tensors:
        gathered = _gather_task(task)
        aligned = gathered is not task.gather_tensors
        shapes: dict[ModelReference, tuple[int, ...]] = {}
        for model, source in gathered.weight_info.items():
            found = _stored_tensor(model, source, planned.options)
            if found == "missing" and not source.optional:
                problems.append(f"{source.name}: not in the checkpoint of {model}")
            elif isinstance(found, tuple):
                shapes[model] = found
        base = shapes.get(planned.base_model)
        for model, shape in shapes.items():
            if base is not None and not _fits(shape, base, weight, aligned):
                hint = (
                    "; with another vocabulary, add `tokenizer: {source: base}`"
                    if weight.vocabulary_axis is not None
                    else "; all models must come from the same base"
                )
                problems.append(
                    f"{weight.name}: shape {_shape_text(shape)} in {model}, {_shape_text(base)} in "
                    f"the base {planned.base_model}{hint}"
                )
    return problems


def planned_shapes(planned: PlannedMerge) -> dict[str, tuple[int, ...]]:
    """Return the base's shape of each tensor that may get a mask, from file headers.

    mergekit may still lengthen the vocabulary axis (see ``vocabulary_aligned``).
    """
    found = {}
    for weight, task in planned.tensors:
        if planned.may_get_mask(weight.name):
            source = _gather_task(task).weight_info[planned.base_model]
            shape = _stored_tensor(planned.base_model, source, planned.options)
            if isinstance(shape, tuple):
                found[weight.name] = shape
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


def _bound_parameters(task: ExecuteMergeMethodTask, group: TensorGroup) -> dict[str, Any]:
    bound = dict(task.parameters.items())
    per_input = {name for values in task.input_parameters.values() for name in values}
    for name in sorted(per_input):
        bound[name] = PerInputValues(
            [
                (entry.id, task.input_parameters[entry.id][name])
                for entry in group.entries
                if name in task.input_parameters.get(entry.id, {})
            ]
        )
    return bound


def _fused_task_vector(group: TensorGroup, parameters: dict[str, Any]) -> Tensor | None:
    base = group.base.tensor
    if not base.is_floating_point():
        return None
    if all(torch.equal(entry.tensor, base) for entry in group.non_base):
        return None
    # A fusion that is linear in the task vectors gives them fused when its base is zero.
    entries = tuple(
        TensorEntry(entry.id, entry.tensor.float() - base.float(), entry.is_base)
        for entry in group.entries
    )
    return fused(TensorGroup(entries, group.metadata), parameters)


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
