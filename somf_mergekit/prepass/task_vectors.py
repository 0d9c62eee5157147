"""The checkpoints of a planned merge, read through mergekit's own loaders."""

from collections.abc import Iterator

from mergekit.common import ModelReference
from mergekit.graph import Executor
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor

from ..common.errors import RecipeError
from ..fusion.groups import are_equal, is_shared_buffer, not_finite
from ..fusion.masked_fusion import merge_of
from ..fusion.merges import LinearMerge, LoadedTensor
from .given_masks import Given, starting_logits
from .plan import PlannedMerge, gather_task, mask_name, task_parameters


def loaded_tensors(planned: PlannedMerge, given: Given) -> Iterator[LoadedTensor]:
    """Yield every tensor of the merge that takes part in a text.

    Args:
        planned: the merge.
        given: masks that are not learned, or that learning starts from.

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
        learned = planned.learned([entry.id for entry in group.non_base])
        own = given if planned.may_get_mask(weight.name) else {}
        merge = None
        if is_number:
            factors = {m: mask.factors(mask_name(task), parameters) for m, mask in own.items()}
            fixed = {model: factor for model, factor in factors.items() if factor}
            merge = merge_of(group, parameters, learned, fixed)
        if not changed and isinstance(merge, LinearMerge) and merge.start is base:
            merge = None
        yield LoadedTensor(
            name=weight.name,
            shape=tuple(base.shape),
            base=base,
            merge=merge,
            learned=learned if merge else (),
            starts=starting_logits(own, learned, mask_name(task)),
            changed=changed,
            parameters=parameters,
            vocabulary_axis=weight.vocabulary_axis,
            aliases=tuple(aliases.get(weight.name, ())),
        )


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
