"""What the checkpoints of a merge say in their headers: what fits, what may get a mask."""

import os
from dataclasses import dataclass
from functools import lru_cache

from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors import safe_open

from .fusions import is_linear
from .plan import PlannedMerge, gather_task, task_parameters


def checkpoint_problems(planned: PlannedMerge) -> list[str]:
    """Return what does not fit between the models, told from file headers alone."""
    problems = []
    missing: dict[ModelReference, list[str]] = {}
    for weight, task in planned.tensors:
        gathered = gather_task(task)
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
class PlannedTensor:
    """A tensor of the merge.

    Attributes:
        may_get_mask: whether the recipe's patterns let it have one.
        kept_as: the name under which its mask is kept.
        shape: of the base's tensor; mergekit may still lengthen the vocabulary axis.
        has_vocabulary: whether one of its axes are the tokens.
        granularity: of a mask that would be learned.
        kept_tensors: how many tensors of this shape learning keeps for the task vectors.
    """

    may_get_mask: bool
    kept_as: str
    shape: tuple[int, ...]
    has_vocabulary: bool
    granularity: str
    kept_tensors: int


def planned_tensors(planned: PlannedMerge) -> dict[str, PlannedTensor]:
    """Return the tensors of the merge by name, as far as file headers tell their shapes."""
    found = {}
    defined: dict[str, tuple[int, ...]] | None = None
    for weight, task in planned.tensors:
        source = gather_task(task).weight_info[task.base_model]
        shape = _stored_tensor(task.base_model, source, planned.options)
        if shape == "unknown":
            if defined is None:
                defined = _defined_shapes(planned)
            shape = defined.get(weight.name, shape)
        if isinstance(shape, tuple):
            found[weight.name] = PlannedTensor(
                may_get_mask=planned.may_get_mask(weight.name),
                has_vocabulary=weight.vocabulary_axis is not None,
                kept_as=str(source.name),
                shape=shape,
                granularity=str(task.parameters["granularity"]),
                kept_tensors=1 if is_linear(task_parameters(task)) else len(task.model_order),
            )
    return found


def _defined_shapes(planned: PlannedMerge) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the merged model's weights as transformers defines them.

    Those of tensors that are put together from several when they are loaded stand in no header.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                planned.out_config, trust_remote_code=planned.options.trust_remote_code
            )
    except ValueError:
        return {}
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


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
        path = os.path.join(index.base_path, file_name)
        return _shapes_in(path, os.stat(path).st_mtime_ns)[name]
    model_type = model.config(trust_remote_code=options.trust_remote_code).model_type
    stored = set(index.tensor_paths)
    if any(can_convert_checkpoint_keys(model_type, stored, name) for name in names):
        return "unknown"
    return "missing"


@lru_cache(maxsize=1024)
def _shapes_in(path: str, _changed: int) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as handle:
        return {n: tuple(handle.get_slice(n).get_shape()) for n in handle.keys()}  # noqa: SIM118


def _fits(shape: tuple[int, ...], base: tuple[int, ...], weight: WeightInfo, aligned: bool) -> bool:
    axis = weight.vocabulary_axis if aligned else None
    return len(shape) == len(base) and all(
        a == b or index == axis for index, (a, b) in enumerate(zip(shape, base, strict=True))
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
