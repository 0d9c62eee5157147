"""What the inputs of one merged tensor hold: numbers to merge, a buffer, or damage."""

import math

import torch
from mergekit.merge_methods.base import TensorGroup


def is_shared_buffer(group: TensorGroup) -> bool:
    """Return whether a tensor holds no numbers to fuse, and all models have the same.

    Older checkpoints store attention's causal mask: truth values, and -inf in float16.
    """
    base = group.base.tensor
    if base.is_floating_point() and is_finite(base):
        return False
    return all(are_equal(entry.tensor, base) for entry in group.non_base)


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype have the same shape and entries."""
    if one.dtype == other.dtype and _is_float8(one.dtype):
        # torch compares no float8.
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity."""
    # NaN and infinity reach the extremes, which cost a fraction of a look at each entry.
    if tensor.numel() == 0:
        return True
    if _is_float8(tensor.dtype):
        # torch finds no extremes of float8.
        tensor = tensor.float()
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def not_finite(group: TensorGroup) -> str | None:
    """Return a sentence on the first input of the group with NaN or infinity, if there is one."""
    for entry in group.entries:
        if not is_finite(entry.tensor):
            return (
                f"{group.metadata.name} of {entry.id} has NaN or infinite entries: the checkpoint "
                "is damaged, or was made in a dtype it overflowed"
            )
    return None


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def as_type(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values as another type, with NaN where a float8 can't hold them.

    Casting to some of these types takes the largest number they have, without a word.
    """
    if not _is_float8(dtype):
        return values.to(dtype)
    of_type = torch.finfo(dtype)
    _, exponent = math.frexp(of_type.max)
    # Half of the last step further, rounding still ends at the largest number.
    largest = of_type.max + of_type.eps * 2.0 ** (exponent - 2)
    return values.masked_fill(values.abs() > largest, math.nan).to(dtype)
