"""Tensors in files: the system keeps in memory what is used, and can take it back."""

import math
import os
import tempfile

import torch
from torch import Tensor

from ..common.errors import RecipeError

_BLOCK = 1 << 22


class MappedFiles:
    """A place for tensors that do not fit in memory.

    The files have no name any more once they are mapped: they go with the process, however that
    ends.
    """

    def __init__(self, folder: str):
        """Take a folder that is there, on a disk with room, not in memory."""
        self._folder = folder

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros in a file of its own.

        Raises:
            RecipeError: the disk is full, or the folder can't be written.
        """
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

    def kept(self, tensor: Tensor) -> Tensor:
        """Return a copy in a file."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _take_room(handle: int, size: int) -> None:
    """Let a new file have ``size`` bytes of the disk, zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    # macOS has no such call; a file that is only made longer has no room yet.
    zeros = bytes(min(size, _BLOCK))
    while size:
        size -= os.write(handle, zeros[:size])
