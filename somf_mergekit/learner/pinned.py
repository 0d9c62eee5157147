"""Tensors in the host's memory that are copied to and from an accelerator."""

import math
import mmap

import torch
from torch import Tensor

from ..common.errors import RecipeError


class PinnedMemory:
    """A place for tensors that do not fit in a device's memory; a context that gives it back.

    A CUDA device copies from and to it by itself, while it computes: the memory is pinned. torch's
    own pinned tensors take up to twice their size: the next power of two. For other kinds of
    device it is ordinary memory.
    """

    def __init__(self, device: torch.device):
        self._is_pinned = device.type == "cuda"
        self._addresses: list[int] = []

    def __enter__(self) -> "PinnedMemory":
        return self

    def __exit__(self, *ended: object) -> None:
        for address in self._addresses:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._addresses.clear()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros in pages of its own.

        Raises:
            RecipeError: there is no memory for it, or it can't be pinned.
        """
        entries = math.prod(shape)
        if entries == 0:
            return torch.empty(shape, dtype=dtype)
        size = entries * dtype.itemsize
        try:
            pages = mmap.mmap(-1, size)
        except OSError as error:
            raise RecipeError(_no_room(size, str(error))) from error
        found = torch.frombuffer(pages, dtype=dtype, count=entries)
        if self._is_pinned:
            failed = int(torch.cuda.cudart().cudaHostRegister(found.data_ptr(), size, 0))
            if failed:
                raise RecipeError(_no_room(size, f"CUDA error {failed}"))
            self._addresses.append(found.data_ptr())
        return found.view(shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """Return a copy in pinned memory."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _no_room(size: int, reason: str) -> str:
    return (
        f"the streaming engine could not pin {size} bytes of memory for the GPU ({reason}): it "
        "needs memory that is free and that the system lets it lock (`ulimit -l` tells how much). "
        "A coarser granularity or fewer masked tensors (include, exclude) need less."
    )
