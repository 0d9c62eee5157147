"""Tensors in files: the system keeps in memory what is used, and can take it back."""

import math
import os
import tempfile

import torch
from torch import Tensor


class MappedFiles:
    """A place for tensors that do not fit in memory.

    The files have no name any more once they are mapped: they go with the process, however that
    ends.
    """

    def __init__(self, folder: str):
        """Take a folder on a disk with room, not in memory; it is made if it is not there."""
        self._folder = folder
        os.makedirs(folder, exist_ok=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros in a file of its own.

        Raises:
            OSError: the disk is full, or the folder can't be written.
        """
        entries = math.prod(shape)
        if entries == 0:
            return torch.empty(shape, dtype=dtype)
        handle, path = tempfile.mkstemp(prefix=".somf-", dir=self._folder)
        try:
            # Without room on the disk, writing to the mapped tensor would kill the process.
            os.posix_fallocate(handle, 0, entries * dtype.itemsize)
            mapped = torch.from_file(path, shared=True, size=entries, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(path)
        return mapped.view(shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """Return a copy in a file."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
