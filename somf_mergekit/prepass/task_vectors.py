"""The checkpoints of a planned merge, read through mergekit's own loaders."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from mergekit.common import ModelReference
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor

from ..common.digests import file_digests
from ..common.errors import RecipeError
from ..fusion.groups import are_equal, is_shared_buffer, not_finite
from ..fusion.weights import Keep, LinearWeight, MergedWeight, merged_weight
from .plan import PlannedMerge, gather_task, task_parameters


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the merge.

    Attributes:
        name: in the merged checkpoint.
        shape: of the tensor.
        base: the base model's tensor, in the recipe's dtype, or the rows of it that are kept.
        weight: the merged weight as a function of the mask; None where the merge is the base's
            whatever the mask (also buffers of integers, or of infinity in every model).
        changed: whether any model differs from the base.
        parameters: the somf method's parameters as mergekit resolved them for this tensor.
        vocabulary_axis: the axis of tokens, if there is one.
        aliases: names of tensors that are tied to it and written alike.
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    weight: MergedWeight | None
    changed: bool
    parameters: dict[str, Any]
    vocabulary_axis: int | None
    aliases: tuple[str, ...] = ()

    def kept(self, keep: Keep, dtype: torch.dtype) -> "LoadedTensor":
        """Return the same with its tensors put where ``keep`` puts them.

        A task vector that is kept as one is in ``dtype``.
        """
        weight = self.weight and self.weight.kept(keep, dtype)
        if isinstance(self.weight, LinearWeight) and self.weight.start is self.base:
            # Kept once.
            base = cast(LinearWeight, weight).start
        else:
            base = keep(self.base)
        return replace(self, base=base, weight=weight)


def loaded_tensors(planned: PlannedMerge) -> Iterator[LoadedTensor]:
    """Yield every tensor of the merge.

    Raises:
        RecipeError: a weight is NaN or infinite.
    """
    by_task = {task.gather_tensors: (task.output_weight, task) for _, task in planned.tensors}
    aliases: dict[str, list[str]] = {}
    for weight, task in planned.tensors:
        if weight.name != task.output_weight.name:
            aliases.setdefault(task.output_weight.name, []).append(weight.name)
    executor = Executor(targets=list(by_task), math_device="cpu", storage_device="cpu")
    for gathered, tensors in executor.run(quiet=planned.options.quiet, desc="Reading task vectors"):
        weight, task = by_task[gathered]
        entries = tuple(
            # Pickled checkpoints may hold parameters, which ask for gradients.
            TensorEntry(model, tensors[model].detach(), model == task.base_model)
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
        changed = any(not are_equal(entry.tensor, base) for entry in group.non_base)
        is_number = base.is_floating_point() and not shared
        merged = merged_weight(group, parameters) if is_number else None
        if not changed and isinstance(merged, LinearWeight) and merged.start is base:
            merged = None
        yield LoadedTensor(
            name=weight.name,
            shape=tuple(base.shape),
            base=base,
            weight=merged,
            changed=changed,
            parameters=parameters,
            vocabulary_axis=weight.vocabulary_axis,
            aliases=tuple(aliases.get(weight.name, ())),
        )


def content_fingerprint(model: ModelReference, cache_dir: str | None = None) -> str:
    """Return a SHA-256 over the contents of a model's weight files.

    Args:
        model: its loader must be set up.
        cache_dir: see ``file_digests``.

    Raises:
        RecipeError: one can't be read.
    """
    index = LoaderCache().get(model).index
    files = sorted(set(index.tensor_paths.values()))
    try:
        paths = [os.path.join(index.base_path, file) for file in files]
        digests = file_digests(paths, cache_dir)
    except OSError as error:
        raise RecipeError(f"model {model}: a file of its weights can't be read: {error}") from error
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def unchanged_models(planned: PlannedMerge) -> list[ModelReference]:
    """Return the models of which no tensor differs from the base's.

    Tensors are read one by one until each model has shown a difference: a few, but where a model
    has none.
    """
    left = [model for model in planned.models if model != planned.base_model]
    # Embeddings are large, and adapters leave them as they are.
    for _, task in sorted(planned.tensors, key=lambda t: t[0].vocabulary_axis is not None):
        if not any(model in left for model in task.model_order):
            continue
        ((_, tensors),) = Executor([gather_task(task)]).run(quiet=True)
        base = tensors.get(task.base_model)
        for model, tensor in tensors.items():
            if model in left and not _is_same(tensor, base):
                left.remove(model)
    return left


def _is_same(tensor: Tensor | None, base: Tensor | None) -> bool:
    if tensor is None or base is None:
        return tensor is base
    return are_equal(tensor.to(base.dtype), base)
