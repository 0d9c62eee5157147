"""Working through a tensor in parts: on the CPU such that fit the processor's cache."""

from collections.abc import Iterator
from types import EllipsisType

import torch
from torch import Tensor

# Entries worked on at once, 1 MiB in float32; elsewhere, where each part costs launches, 64 MiB.
PIECE = 1 << 18
_PIECE_OF_DEVICE = 1 << 24


def pieces(count: int, device: torch.device | str = "cpu") -> list[slice]:
    """Return the parts of ``count`` entries that are worked on one after another."""
    step = piece_entries(device)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def piece_entries(device: torch.device | str) -> int:
    """Return how many entries of a tensor on a device are worked on at once."""
    return PIECE if torch.device(device).type == "cpu" else _PIECE_OF_DEVICE


def row_blocks(tensor: Tensor, entries: int | None = None) -> Iterator[slice | EllipsisType]:
    """Yield parts of a tensor's first axis, of about ``entries``, to work on in turn.

    Args:
        tensor: on any device.
        entries: as many as ``piece_entries`` says where not given.
    """
    if tensor.dim() == 0:
        yield ...
        return
    entries = entries or piece_entries(tensor.device)
    rows = max(1, entries * len(tensor) // max(1, tensor.numel()))
    yield from (slice(start, start + rows) for start in range(0, len(tensor), rows))
