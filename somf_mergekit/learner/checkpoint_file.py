"""A checkpoint on disk: logits, moments, and what was computed to compare with.

It is a safetensors file, whose last tensor is a checksum over the header and all others. It is
written tensor by tensor: the library's own way needs all of them in memory. The format is that of
https://huggingface.co/docs/safetensors: the length of a header, the header as JSON, and the
tensors' bytes one after another.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from ..common.files import sync
from .tensors import MaskedTensor

FORMAT = "somf-checkpoint/2"
_HEADER_KEY = "somf"
_PAIRS, _RATIOS = "reference rows", "reference"
_TOKENS, _LENGTHS, _UNMASKED = "utility rows", "utility lengths", "utility"
_COMPARED = (_PAIRS, _RATIOS, _TOKENS, _LENGTHS, _UNMASKED)
_CHECKSUM = "checksum"
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
# The bytes begin where every type is aligned.
_ALIGNMENT = 8


@dataclass
class Progress:
    """How far learning has come, but for the logits.

    Attributes:
        step: steps that are done.
        history: a row per step.
        reference: log-probabilities of each pair's answers under the reference, by its number.
        unmasked: of each utility answer's tokens under the unmasked merge, by its number.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[int, tuple[float, float]] = field(default_factory=dict)
    unmasked: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written, of a dtype in _TYPES; ``content`` gives it when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Callable[[], Tensor]


def write_checkpoint(
    path: str, fingerprint: Any, progress: Progress, tensors: Sequence[MaskedTensor]
) -> None:
    """Write a checkpoint that is there whole, and on the disk, or not at all.

    Args:
        path: of the file.
        fingerprint: of what decides the mask, as JSON.
        progress: of all processes.
        tensors: whose logits and moments are stored.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    reference, unmasked = progress.reference, progress.unmasked
    compared = {
        _PAIRS: torch.tensor(list(reference), dtype=torch.int64),
        _RATIOS: torch.tensor(list(reference.values()), dtype=torch.float64).reshape(-1, 2),
        _TOKENS: torch.tensor(list(unmasked), dtype=torch.int64),
        _LENGTHS: torch.tensor(list(map(len, unmasked.values())), dtype=torch.int64),
        _UNMASKED: torch.cat([torch.empty(0), *unmasked.values()]),
    }
    content = [
        StoredTensor(name, tuple(own.shape), own.dtype, own.contiguous)
        for name, own in compared.items()
    ]
    content += [
        StoredTensor(f"{name}/{t.name}", t.layout.shape, torch.float32, partial(t.whole, name))
        for t in tensors
        for name in t.state
    ]
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "step": progress.step,
        "history": progress.history,
    }
    write_safetensors(path, content, {_HEADER_KEY: json.dumps(header, sort_keys=True)})


def read_checkpoint(path: str, fingerprint: Any, tensors: Sequence[MaskedTensor]) -> Progress:
    """Return what a checkpoint says, and set logits and moments to what it has.

    Raises:
        SafetensorError, OSError, ValueError, KeyError, TypeError: it is damaged, or of another
            recipe or format.
    """
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[_HEADER_KEY]
        header, checksum = json.loads(text), xxhash.xxh3_128(text.encode())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']}, not {FORMAT}")
        if header["fingerprint"] != fingerprint:
            raise ValueError("it is of another recipe")
        stored = {f"{name}/{t.name}": t.layout.shape for t in tensors for name in t.state}
        if any(tuple(file.get_slice(n).get_shape()) != shape for n, shape in stored.items()):
            raise ValueError("its masks have other shapes")
        values = {name: file.get_tensor(name) for name in _COMPARED}
        for value in values.values():
            checksum.update(_bytes(value))
        for tensor in tensors:
            for name in tensor.state:
                whole = file.get_tensor(f"{name}/{tensor.name}")
                checksum.update(_bytes(whole))
                tensor.set_whole(whole, name)
        if bytes(file.get_tensor(_CHECKSUM).tolist()) != checksum.digest():
            raise ValueError("it is damaged (its checksum is another)")
    lengths = values[_LENGTHS].tolist()
    tokens = values[_UNMASKED].clone().split(lengths) if lengths else ()
    device = tensors[0].device
    pairs = zip(values[_PAIRS].tolist(), values[_RATIOS].tolist(), strict=True)
    utility = zip(values[_TOKENS].tolist(), tokens, strict=True)
    return Progress(
        step=int(header["step"]),
        history=list(header["history"]),
        reference={row: (chosen, rejected) for row, (chosen, rejected) in pairs},
        unmasked={row: own.to(device) for row, own in utility},
    )


def recorded_fingerprint(path: str) -> Any:
    """Return the fingerprint in a checkpoint.

    Raises:
        SafetensorError, OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    return json.loads(safe_open(path, framework="pt").metadata()[_HEADER_KEY])["fingerprint"]


def write_safetensors(
    path: str, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors, and behind them a checksum over the metadata's texts and their bytes.

    Until the file is complete it has ``.partial`` behind its name.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    checksum = xxhash.xxh3_128("".join(metadata.values()).encode())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    sizes = [(t.name, t.dtype, t.shape) for t in tensors]
    for name, dtype, shape in [*sizes, (_CHECKSUM, torch.uint8, (checksum.digest_size,))]:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [start, end]
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    partial_path = f"{path}.partial"
    try:
        with open(partial_path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                content = _bytes(tensor.content().detach().to("cpu", tensor.dtype))
                checksum.update(content)
                file.write(content)
            file.write(checksum.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
        sync(os.path.dirname(path))
    except BaseException:
        if os.path.exists(partial_path):
            os.unlink(partial_path)
        raise


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU as the file has them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
