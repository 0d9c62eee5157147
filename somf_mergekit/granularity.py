"""What one entry of a mask covers: one weight, a row, a column, an attention head, a tensor."""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

GRANULARITIES = ("weight", "row", "column", "head", "tensor")
# How attention tensors keep their heads: which axis, and how many head widths in a row belong to
# one head. Linear layers are (out, in); GPT-2's are (in, out).
_HEADS = (
    (r"attention\.query_key_value\.(weight|bias)$", 0, 3),
    (r"attn\.c_attn\.weight$", 1, 1),
    (r"attn\.c_attn\.bias$", 0, 1),
    (r"attn\.c_proj\.weight$", 0, 1),
    (r"\.(q|k|v|qkv|query|key|value)_proj\.(weight|bias)$", 0, 1),
    (r"(self_attn\.(o_proj|out_proj|dense)|attention\.dense)\.weight$", 1, 1),
)


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

    def spread(self, entries: Tensor) -> Tensor:
        """Return one value per entry in a shape that broadcasts to the weight."""
        if self.repeat == 1:
            return entries
        return entries.repeat_interleave(self.repeat, dim=self.axis)

    def collected(self, values: Tensor) -> Tensor:
        """Return the sum, for each entry, of the values in the weight's shape that it covers."""
        spread = list(self.shape)
        if self.repeat > 1:
            spread[self.axis] *= self.repeat
        summed = values.sum_to_size(spread)
        if self.repeat == 1:
            return summed
        return summed.unflatten(self.axis, (-1, self.repeat)).sum(self.axis + 1)


def mask_layout(granularity: str, name: str, shape: tuple[int, ...], head_width: int) -> Layout:
    """Return how a mask of ``granularity`` lies on the weight ``name``.

    A vector is a column of rows with one entry each. With ``head``, tensors in which no heads are
    found get rows.

    Args:
        granularity: one of GRANULARITIES.
        name: of the weight in the checkpoint.
        shape: of the weight.
        head_width: entries of one attention head.
    """
    ones = (1,) * len(shape)
    if granularity == "weight" or not shape:
        return Layout(tuple(shape))
    if granularity == "tensor":
        return Layout(ones)
    if granularity == "column":
        return Layout((*ones[1:], shape[-1]) if len(shape) > 1 else ones)
    if granularity == "head":
        for pattern, axis, widths in _HEADS:
            size = widths * head_width
            if re.search(pattern, name) and len(shape) > axis and shape[axis] % size == 0:
                heads = shape[axis] // size
                return Layout((*ones[:axis], heads, *ones[axis + 1 :]), axis, size)
    return Layout((shape[0], *ones[1:]))


def head_width(config: Any) -> int:
    """Return the entries of one attention head.

    Args:
        config: a transformers configuration.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None)
    return int(width or text.hidden_size // text.num_attention_heads)
