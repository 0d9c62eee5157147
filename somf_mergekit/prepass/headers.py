"""What the checkpoints of a merge say in their headers: what fits, what may get a mask."""

import contextlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.tokenizer import PermutedVocabulary
from safetensors import SafetensorError, safe_open

from ..common.errors import RecipeError, few
from ..common.model_classes import empty_model, shapes_of
from ..fusion.fuse import is_linear
from ..mask.granularity import Layout, Storage, mask_layout
from .plan import PlannedMerge, gather_task, mask_name, task_parameters
from .tensor_sets import is_missing, names_of, tensor_set_problems

# As weights of models are stored once they are quantized.
_INTEGERS = ("I8", "U8", "I32")


def checkpoint_problems(planned: PlannedMerge) -> list[str]:
    """Return what does not fit between the models, as far as file headers say.

    Raises:
        RecipeError: a file is missing, damaged, or without a tensor of its index.
    """
    problems = tensor_set_problems(planned.tensors, planned.options)
    quantized: dict[ModelReference, list[str]] = {}
    for weight, task in planned.tensors:
        gathered = gather_task(task)
        aligned = gathered is not task.gather_tensors
        stored = {m: _stored_as(m, source) for m, source in gathered.weight_info.items()}
        known = {model: found for model, found in stored.items() if found}
        base = known.get(task.base_model)
        if not (weight.force_dtype or planned.config.dtype):
            problems += _type_problems(weight, gathered, {kind for _, kind in known.values()})
        for model, (shape, kind) in known.items():
            if kind in _INTEGERS and len(shape) > 1 and weight.name.endswith("weight"):
                quantized.setdefault(model, []).append(weight.name)
            if base is not None and not _fits(shape, base[0], weight, aligned):
                hint = (
                    "; with another vocabulary, add `tokenizer: {source: base}`"
                    if weight.vocabulary_axis is not None
                    else "; all models must come from the same base"
                )
                problems.append(
                    f"{weight.name}: shape {_shape_text(shape)} in {model}, "
                    f"{_shape_text(base[0])} in the base {task.base_model}{hint}"
                )
    return problems + [
        f"{model}: it is quantized, since {few(names)} are stored as integers; give it in bfloat16 "
        "or float32"
        for model, names in quantized.items()
    ]


def _type_problems(weight: WeightInfo, gathered: Any, types: set[str]) -> list[str]:
    """Return a sentence where a tensor is stored in types that can't be fused."""
    if any(kind.startswith("F8") for kind in types):
        return [
            f"{weight.name} is stored in float8: set `dtype: bfloat16` or `float32` to merge in"
        ]
    if all(kind.startswith(("F", "BF")) for kind in types):
        return []
    # Small, as only buffers are: mergekit copies what is alike, and fuses none of it.
    ((_, tensors),) = Executor([gathered]).run(quiet=True)
    first, *others = tensors.values()
    if all(torch.equal(first, other) for other in others):
        return []
    return [
        f"{weight.name} holds whole numbers, which can't be fused, and the models have different "
        "ones; `dtype: float32` takes them for numbers like others"
    ]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the merge.

    Attributes:
        may_get_mask: whether the recipe's patterns let it have one.
        mask_name: the name under which its mask is stored.
        shape: as merged, with the vocabulary that mergekit aligns all models to.
        has_vocabulary: whether one of its axes are the tokens.
        granularity: of a mask that would be learned.
        masks: how many are learned.
        delta_tensors: how many tensors of this shape learning holds for the task vectors.
        itemsize: bytes of a number in the type that the models are merged in.
    """

    may_get_mask: bool
    mask_name: str
    shape: tuple[int, ...]
    has_vocabulary: bool
    granularity: str
    masks: int
    delta_tensors: int
    itemsize: int

    def layout(self, name: str, storage: Storage) -> Layout:
        """Return how the entries of a mask that would be learned lie on the tensor of this name."""
        return mask_layout(self.granularity, name, self.shape, storage, self.has_vocabulary)


def planned_tensors(planned: PlannedMerge) -> dict[str, PlannedTensor]:
    """Return the tensors of a somf merge by name, whose shapes file headers say."""
    shapes = tensor_shapes(planned)

    def planned_tensor(weight: WeightInfo, task: Any) -> PlannedTensor:
        models = tuple(model for model in task.model_order if model != task.base_model)
        learned = planned.learned(models)
        is_linear_in_them = is_linear(task_parameters(task), learned == (models,))
        return PlannedTensor(
            may_get_mask=planned.may_get_mask(weight.name),
            has_vocabulary=weight.vocabulary_axis is not None,
            mask_name=mask_name(task),
            shape=shapes[weight.name],
            granularity=str(task.parameters["granularity"]),
            masks=len(learned),
            delta_tensors=len(learned if is_linear_in_them else task.model_order),
            itemsize=_itemsize(planned, weight, task),
        )

    return {
        weight.name: planned_tensor(weight, task)
        for weight, task in planned.tensors
        # Of weights that are tied, the first stands for both.
        if weight.name in shapes and weight.name == task.output_weight.name
    }


def tensor_shapes(planned: PlannedMerge) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a merge, as far as file headers say them."""
    found, unstored = {}, []
    for weight, task in planned.tensors:
        source = gather_task(task).weight_info[task.base_model]
        stored = _stored_as(task.base_model, source)
        if stored:
            found[weight.name] = _aligned(planned, weight, task, stored[0])
        elif not is_missing(task.base_model, source, planned.options):
            unstored.append((weight, task))
    # Those that are put together from several when they are loaded stand in no header.
    if unstored:
        trust = planned.options.trust_remote_code
        with contextlib.suppress(ValueError):
            defined = shapes_of(empty_model(planned.out_config, trust))
            for weight, task in unstored:
                if weight.name in defined:
                    found[weight.name] = _aligned(planned, weight, task, defined[weight.name])
    return found


def aligned_vocabulary(planned: PlannedMerge) -> int | None:
    """Return how many tokens the merge has; None where no vocabulary is aligned."""
    found = (_aligned_tokens(planned, weight, task) for weight, task in planned.tensors)
    return next((tokens for tokens in found if tokens is not None), None)


def _itemsize(planned: PlannedMerge, weight: WeightInfo, task: Any) -> int:
    merged_in = dtype_from_name(weight.force_dtype or planned.config.dtype)
    if merged_in is not None:
        return merged_in.itemsize
    stored = _stored_as(task.base_model, gather_task(task).weight_info[task.base_model])
    bits = re.match(r"[A-Z]+(\d+)", stored[1]) if stored else None
    return int(bits[1]) // 8 if bits else torch.float32.itemsize


def _aligned(
    planned: PlannedMerge, weight: WeightInfo, task: Any, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return a shape with as many tokens as the tensor has once mergekit has aligned the models."""
    axis, tokens = weight.vocabulary_axis, _aligned_tokens(planned, weight, task)
    return shape if axis is None or tokens is None else (*shape[:axis], tokens, *shape[axis + 1 :])


def _aligned_tokens(planned: PlannedMerge, weight: WeightInfo, task: Any) -> int | None:
    """Return how many tokens mergekit aligns a tensor of all models to; None where it doesn't."""
    aligning, gathered, axis = task.gather_tensors, gather_task(task), weight.vocabulary_axis
    if aligning is gathered or axis is None:
        return None
    if isinstance(aligning, PermutedVocabulary):
        step = aligning.pad_to_multiple_of or 1
        return -(-len(planned.tokenizer_info.tokenizer.get_vocab()) // step) * step
    # Cut to the smallest vocabulary.
    stored = (_stored_as(model, source) for model, source in gathered.weight_info.items())
    return min((found[0][axis] for found in stored if found), default=None)


def _stored_as(model: ModelReference, source: WeightInfo) -> tuple[tuple[int, ...], str] | None:
    """Return a tensor's shape and type from the file header, None where it has none."""
    index = LoaderCache().get(model).index
    name = next((name for name in names_of(source) if name in index.tensor_paths), None)
    if name is None or not index.tensor_paths[name].endswith(".safetensors"):
        return None
    path = os.path.join(index.base_path, index.tensor_paths[name])
    try:
        shapes, types = _header(path, os.stat(path).st_mtime_ns)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"model {model}: {path} can't be read: {error}") from error
    if name not in shapes:
        raise RecipeError(
            f"model {model}: {name} is not in {path}, where the checkpoint's index says it is"
        )
    return shapes[name], types[name]


@lru_cache(maxsize=1024)
def _header(path: str, _changed: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes and the types of the tensors in a file."""
    with safe_open(path, framework="pt") as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    return shapes, {name: part.get_dtype() for name, part in parts.items()}


def _fits(shape: tuple[int, ...], base: tuple[int, ...], weight: WeightInfo, aligned: bool) -> bool:
    axis = weight.vocabulary_axis if aligned else None
    return len(shape) == len(base) and all(
        a == b or index == axis for index, (a, b) in enumerate(zip(shape, base, strict=True))
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
