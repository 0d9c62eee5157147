"""Working through a tensor in parts that fit the processor's cache."""

from collections.abc import Iterator
from types import EllipsisType

from torch import Tensor

# Entries worked on at once: 1 MiB in float32.
PIECE = 1 << 18


def pieces(count: int) -> list[slice]:
    """Return the parts of ``count`` entries that are worked on one after another."""
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]


def row_blocks(tensor: Tensor, entries: int | None = None) -> Iterator[slice | EllipsisType]:
    """Yield parts of a tensor's first axis, of about ``entries`` or PIECE, to work on in turn."""
    if tensor.dim() == 0:
        yield ...
        return
    rows = max(1, (entries or PIECE) * len(tensor) // max(1, tensor.numel()))
    yield from (slice(start, start + rows) for start in range(0, len(tensor), rows))
