"""Where the streaming engine stores what it brings layer by layer: files, or pinned memory."""

import math
import mmap
import os
import tempfile
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..common.errors import RecipeError

_BLOCK = 1 << 22


class Store(ABC):
    """A place for tensors."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros.

        Raises:
            RecipeError: there is no room for it.
        """

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor that is stored here."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


class MappedFiles(Store):
    """Files mapped to memory: the system holds there what is used, and can take it back.

    The files have no name any more once they are mapped: they go with the process, however that
    ends.
    """

    def __init__(self, folder: str):
        """Use a folder that is there, on a disk with room, not in memory."""
        self._folder = folder

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros in a file of its own."""
        entries = math.prod(shape)
        if entries == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            handle, path = tempfile.mkstemp(prefix=".somf-", dir=self._folder)
            try:
                # Without room on the disk, writing to the mapped tensor would kill the process.
                _take_room(handle, entries * dtype.itemsize)
                mapped = torch.from_file(path, shared=True, size=entries, dtype=dtype)
            finally:
                os.close(handle)
                os.unlink(path)
        except OSError as error:
            raise RecipeError(
                f"the streaming engine has no room for its files in {self._folder}: {error}. "
                "--work-dir (SOMF_WORK_DIR) puts them, and the mask, on another disk."
            ) from error
        return mapped.view(shape)


def _take_room(handle: int, size: int) -> None:
    """Let a new file have ``size`` bytes of the disk, zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    # macOS has no such call; a file that is only made longer has no room yet.
    zeros = bytes(min(size, _BLOCK))
    while size:
        size -= os.write(handle, zeros[:size])


class PinnedMemory(Store):
    """The host's memory, copied to and from an accelerator; a context that gives it back.

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
        """Return a tensor of zeros in pages of its own."""
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


def _no_room(size: int, reason: str) -> str:
    return (
        f"the streaming engine could not pin {size} bytes of memory for the GPU ({reason}): it "
        "needs memory that is free and that the system lets it lock (`ulimit -l` shows how much). "
        "A coarser granularity or fewer masked tensors (include, exclude) need less."
    )
