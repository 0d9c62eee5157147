"""What one entry of a mask covers: one weight, a row, a column, an attention head, a tensor."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRANULARITIES = ("weight", "row", "column", "head", "tensor")
# Where attention tensors have their heads: along outputs or inputs, and how many head widths in a
# row belong to one head. GPT-NeoX has a head's query, key and value side by side; other tensors
# that hold all three have them apart or in groups, so that each gets an entry of its own.
_HEADS = (
    (r"(^|\.)attention\.query_key_value\.(weight|bias)$", "outputs", 3),
    (r"self_attention\.query_key_value\.(weight|bias)$", "outputs", 1),
    (r"attn\.c_attn\.(weight|bias)$", "outputs", 1),
    (r"\.(q|k|v|qkv|query|key|value)_proj\.(weight|bias)$", "outputs", 1),
    (r"attn\.c_proj\.weight$", "inputs", 1),
    (r"(self_attn\.(o_proj|out_proj|dense)|attention\.dense)\.weight$", "inputs", 1),
)
# Layers are (out, in), but for these of GPT-2 and its descendants.
_INPUTS_FIRST = re.compile(r"\.(c_attn|c_proj|c_fc2?)\.weight$")
_INPUTS_FIRST_MODELS = ("gpt2", "jais")


@dataclass(frozen=True)
class Layout:
    """How a mask's entries lie on a weight.

    Attributes:
        shape: of the entries; broadcasts to the weight once ``axis`` is repeated.
        axis: the axis along which one entry covers several places.
        repeat: how many.
    """

    shape: tuple[int, ...]
    axis: int = 0
    repeat: int = 1

    @property
    def expanded_shape(self) -> tuple[int, ...]:
        """The shape that broadcasts to the weight."""
        return tuple(
            size * (self.repeat if axis == self.axis else 1) for axis, size in enumerate(self.shape)
        )

    def expand(self, entries: Tensor) -> Tensor:
        """Return one value per entry in a shape that broadcasts to the weight."""
        if self.repeat == 1:
            return entries
        return entries.repeat_interleave(self.repeat, dim=self.axis)

    def reduce(self, values: Tensor) -> Tensor:
        """Return the sum, for each entry, of the values in the weight's shape that it covers."""
        summed = values.sum_to_size(self.expanded_shape)
        if self.repeat == 1:
            return summed
        return summed.unflatten(self.axis, (-1, self.repeat)).sum(self.axis + 1)


@dataclass(frozen=True)
class Storage:
    """How a model stores its weights.

    Attributes:
        head_width: entries of one attention head; 0 where there are none of one width.
        inputs_first: whether layers named as GPT-2's are (in, out).
    """

    head_width: int
    inputs_first: bool = False


def weight_storage(config: Any) -> Storage:
    """Return how a model stores its weights.

    Args:
        config: a transformers configuration.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None)
    heads = getattr(text, "num_attention_heads", None)
    if not width and isinstance(heads, int) and heads > 0:
        width = text.hidden_size // heads
    width = width if isinstance(width, int) else 0
    return Storage(width, text.model_type in _INPUTS_FIRST_MODELS)


def mask_layout(granularity: str, name: str, shape: tuple[int, ...], storage: Storage) -> Layout:
    """Return how a mask of ``granularity`` lies on the weight ``name``.

    A vector is a column of rows with one entry each. More than two axes are a stack of matrices,
    such as a mixture's experts, each with rows and columns of its own. With ``head``, tensors in
    which no heads are found get rows.

    Args:
        granularity: one of GRANULARITIES.
        name: of the weight in the checkpoint.
        shape: of the weight.
        storage: how the model stores its weights.
    """
    if granularity == "weight" or not shape:
        return Layout(tuple(shape))
    if granularity == "tensor":
        return Layout((1,) * len(shape))
    axes = _axes(name, len(shape), storage)
    if granularity == "head":
        for pattern, along, widths in _HEADS:
            axis, size = axes[along], widths * storage.head_width
            if axis is not None and size and shape[axis] % size == 0 and re.search(pattern, name):
                return Layout(_entry_shape(shape, axis, shape[axis] // size), axis, size)
    axis = axes["inputs" if granularity == "column" else "outputs"]
    return Layout((1,)) if axis is None else Layout(_entry_shape(shape, axis, shape[axis]))


def _axes(name: str, count: int, storage: Storage) -> dict[str, int | None]:
    if count == 1:
        return {"outputs": 0, "inputs": None}
    first, second = count - 2, count - 1
    if storage.inputs_first and _INPUTS_FIRST.search(name):
        first, second = second, first
    return {"outputs": first, "inputs": second}


def _entry_shape(shape: tuple[int, ...], axis: int, entries: int) -> tuple[int, ...]:
    """Return a shape with ``entries`` on ``axis``, one on the matrices' other axis."""
    last = range(len(shape) - 2, len(shape))
    return tuple(
        entries if at == axis else 1 if at in last else size for at, size in enumerate(shape)
    )


def mask_shape_problem(
    name: str, mask: tuple[int, ...], weight: tuple[int, ...], where: str
) -> str | None:
    """Return a sentence on a mask that does not broadcast to its weight, None where it does."""
    try:
        fits = torch.broadcast_shapes(mask, weight) == torch.Size(weight)
    except RuntimeError:
        fits = False
    if fits:
        return None
    return (
        f"{name}: the mask in {where} has shape {mask}, the weight {weight}: the mask is of "
        "another model"
    )
