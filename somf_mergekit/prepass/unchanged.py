"""Fine-tuned models that change nothing: which they are is read from the weights themselves."""

from mergekit.common import ModelReference
from mergekit.graph import Executor
from torch import Tensor

from ..fusion.groups import are_equal
from .plan import PlannedMerge, gather_task


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
