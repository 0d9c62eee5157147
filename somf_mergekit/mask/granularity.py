"""What one entry of a mask covers: one weight, a row, a column, an attention head, a tensor."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRANULARITIES = ("weight", "row", "column", "row_column", "head", "tensor")
# Where attention tensors have their heads: along outputs or inputs, and how many head widths in a
# row belong to one head. GPT-NeoX has a head's query, key and value side by side; other tensors
# that hold all three have them apart or in groups, so that each gets an entry of its own.
_HEADS = (
    (r"(^|\.)attention\.query_key_value\.(weight|bias)$", "outputs", 3),
    (r"self_attention\.query_key_value\.(weight|bias)$", "outputs", 1),
    (r"attn\.c_attn\.(weight|bias)$", "outputs", 1),
    (r"\.(q|k|v|qkv|query|key|value)_proj\.(weight|bias)$", "outputs", 1),
    (r"attn\.c_proj\.weight$", "inputs", 1),
    (r"(self_attn\.(o_proj|out_proj|dense)|mixer\.o_proj|attention\.dense)\.weight$", "inputs", 1),
)
# Layers are (out, in), but for these of GPT-2 and its descendants.
_INPUTS_FIRST = re.compile(r"\.(c_attn|c_proj|c_fc2?)\.weight$")
_INPUTS_FIRST_MODELS = ("gpt2", "jais")
# The experts of a layer in one tensor, (experts, out, in) or (experts, in, out), and their biases,
# (experts, out). Some read the hidden states, the others write to them.
_EXPERTS = re.compile(r"\bexperts\.((?P<reads>gate_up_proj|gate_proj|up_proj|fc1)|down_proj|fc2)\b")
_EXPERTS_INPUTS_FIRST_MODELS = ("gpt_oss", "llama4_text", "aria_text")
_EXPERT_BIAS = re.compile(r"\bexperts\.\w+(_bias|\.bias)$")
_CONVOLUTION = re.compile(r"conv|patch_embed")


@dataclass(frozen=True)
class Layout:
    """How a mask's entries lie on a weight.

    Attributes:
        shape: of the entries; broadcasts to the weight once ``axis`` is repeated.
        axis: the axis along which one entry covers several places.
        repeat: how many.
        factors: layouts of the masks whose product this one is; their entries come one after the
            other, so that ``shape`` has one axis. Empty where it isn't a product.
    """

    shape: tuple[int, ...]
    axis: int = 0
    repeat: int = 1
    factors: tuple["Layout", ...] = ()

    @classmethod
    def product(cls, *factors: "Layout") -> "Layout":
        """Return the layout of a mask that is the product of masks of these layouts."""
        return cls((sum(math.prod(factor.shape) for factor in factors),), factors=factors)

    @property
    def expanded_shape(self) -> tuple[int, ...]:
        """The shape that broadcasts to the weight."""
        if self.factors:
            return tuple(torch.broadcast_shapes(*(one.expanded_shape for one in self.factors)))
        return tuple(
            size * (self.repeat if axis == self.axis else 1) for axis, size in enumerate(self.shape)
        )

    def parts(self) -> Iterator[tuple[slice, "Layout"]]:
        """Yield the layout of each factor, with its place among the flattened entries."""
        start = 0
        for factor in self.factors or (self,):
            end = start + math.prod(factor.shape)
            yield slice(start, end), factor
            start = end

    def expand_factors(self, entries: Tensor) -> tuple[Tensor, ...]:
        """Return one value per entry as tensors that broadcast to the weight, one a factor."""
        flat = entries.reshape(-1)
        return tuple(part._repeated(flat[at].view(part.shape)) for at, part in self.parts())

    def expand(self, entries: Tensor) -> Tensor:
        """Return one value per entry in a shape that broadcasts to the weight."""
        return product(self.expand_factors(entries))

    def reduce(self, values: Tensor) -> Tensor:
        """Return the sum, for each entry, of the values in the weight's shape that it covers.

        Of a layout without factors.
        """
        summed = values.sum_to_size(self.expanded_shape)
        if self.repeat == 1:
            return summed
        return summed.unflatten(self.axis, (-1, self.repeat)).sum(self.axis + 1)

    def _repeated(self, entries: Tensor) -> Tensor:
        if self.repeat == 1:
            return entries
        return entries.repeat_interleave(self.repeat, dim=self.axis)


def product(tensors: Sequence[Tensor]) -> Tensor:
    """Return the product of one or more tensors."""
    first, *others = tensors
    return math.prod(others, start=first)


@dataclass(frozen=True)
class Storage:
    """How a model stores its weights.

    Attributes:
        head_width: entries of one attention head; 0 where there are none of one width.
        inputs_first: whether layers named as GPT-2's are (in, out), and packed experts too where
            the hidden size doesn't tell.
        hidden_size: the width that experts read and write; 0 where it isn't known.
    """

    head_width: int
    inputs_first: bool = False
    hidden_size: int = 0


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
    # Latent attention has heads of several widths.
    if not isinstance(width, int) or getattr(text, "kv_lora_rank", None):
        width = 0
    inputs_first = text.model_type in (*_INPUTS_FIRST_MODELS, *_EXPERTS_INPUTS_FIRST_MODELS)
    return Storage(width, inputs_first, getattr(text, "hidden_size", 0))


def mask_layout(
    granularity: str,
    name: str,
    shape: tuple[int, ...],
    storage: Storage,
    has_vocabulary: bool = False,
) -> Layout:
    """Return how a mask of ``granularity`` lies on the weight ``name``.

    A vector is a column of rows with one entry each. A stack of matrices, such as a mixture's
    experts, has rows and columns of each matrix; so have the biases of experts. A convolution's
    rows are its output channels, its columns the input channels; a depthwise one has one entry a
    channel for both. With ``head``, tensors in which no heads are found get rows; so do vectors
    and tensors with a vocabulary with ``row_column``, which has an entry for each row and one for
    each column of other tensors.

    Args:
        granularity: one of GRANULARITIES.
        name: of the weight in the checkpoint.
        shape: of the weight.
        storage: how the model stores its weights.
        has_vocabulary: whether one of its axes are the tokens.
    """
    if granularity == "weight" or not shape:
        return Layout(tuple(shape))
    if granularity == "tensor":
        return Layout((1,) * len(shape))
    axes, stacked = _axes(name, shape, storage)

    def layout(axis: int | None, repeat: int = 1) -> Layout:
        sizes = tuple(
            size if at < stacked else size // repeat if at == axis else 1
            for at, size in enumerate(shape)
        )
        return Layout(sizes) if axis is None or repeat == 1 else Layout(sizes, axis, repeat)

    if granularity == "head":
        for pattern, along, widths in _HEADS:
            axis, size = axes[along], widths * storage.head_width
            if axis is not None and size and shape[axis] % size == 0 and re.search(pattern, name):
                return layout(axis, size)
    rows, columns = layout(axes["outputs"]), layout(axes["inputs"])
    if granularity == "row_column" and axes["inputs"] is not None and not has_vocabulary:
        return Layout.product(rows, columns) if axes["inputs"] != axes["outputs"] else rows
    return columns if granularity == "column" else rows


def _axes(name: str, shape: tuple[int, ...], storage: Storage) -> tuple[dict[str, int | None], int]:
    """Return the axes of a tensor's outputs and inputs, and how many axes of a stack come first."""
    count = len(shape)
    if count == 1 or (count == 2 and _EXPERT_BIAS.search(name)):
        return {"outputs": count - 1, "inputs": None}, count - 1
    if count > 3 or (count == 3 and _CONVOLUTION.search(name)):
        return {"outputs": 0, "inputs": 0 if shape[1] == 1 else 1}, 0
    first, second = count - 2, count - 1
    if _inputs_first(name, shape, storage):
        first, second = second, first
    return {"outputs": first, "inputs": second}, count - 2


def _inputs_first(name: str, shape: tuple[int, ...], storage: Storage) -> bool:
    """Return whether matrices are (in, out): packed experts by where their hidden size is."""
    experts = _EXPERTS.search(name) if len(shape) == 3 else None
    if experts is None:
        return storage.inputs_first and _INPUTS_FIRST.search(name) is not None
    is_first, is_last = (size == storage.hidden_size for size in shape[1:])
    if is_first == is_last:
        return storage.inputs_first
    return is_first if experts["reads"] else is_last


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
