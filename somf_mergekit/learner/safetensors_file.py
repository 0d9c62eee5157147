"""Writing a safetensors file tensor by tensor: the library's own way needs all of them in memory.

The format is that of https://huggingface.co/docs/safetensors: the length of a header, the header as
JSON, and the tensors' bytes one after another.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.files import sync

_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
# The bytes begin where every type is aligned.
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written.

    Attributes:
        name: of the tensor.
        shape: of it.
        dtype: of it, one that the file knows by _TYPES.
        content: gives it when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "StoredTensor":
        """Return a tensor that is at hand."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU as the file has them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(
    path: str, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write a file that is there whole, and on the disk, or not at all.

    Until it is complete it has ``.partial`` behind its name.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.write(tensor_bytes(tensor.content().detach().to("cpu", tensor.dtype)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(os.path.dirname(path))
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
