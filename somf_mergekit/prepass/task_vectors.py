"""The checkpoints of a planned merge, read through mergekit's own loaders."""

import hashlib
import os
from collections.abc import Iterator

from mergekit.common import ModelReference
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor

from ..common.digests import file_digests
from ..common.errors import RecipeError
from ..fusion.groups import are_equal, is_shared_buffer, not_finite
from ..fusion.merges import LinearMerge, LoadedTensor, merge_of
from .plan import PlannedMerge, gather_task, task_parameters


def loaded_tensors(planned: PlannedMerge) -> Iterator[LoadedTensor]:
    """Yield every tensor of the merge that takes part in a text.

    Raises:
        RecipeError: a weight is NaN or infinite.
    """
    text = planned.text_tensors
    by_task = {task.gather_tensors: (task.output_weight, task) for _, task in text}
    aliases: dict[str, list[str]] = {}
    for weight, task in text:
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
        merge = merge_of(group, parameters) if is_number else None
        if not changed and isinstance(merge, LinearMerge) and merge.start is base:
            merge = None
        yield LoadedTensor(
            name=weight.name,
            shape=tuple(base.shape),
            base=base,
            merge=merge,
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
