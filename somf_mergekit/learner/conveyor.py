"""Brings what weights are made of from the host's memory to a GPU, before it is needed.

A layer's tensors go into one of two slots on the GPU. While the layer in one slot is computed with,
the next one's come into the other, on a stream of their own, and changed logits go back on a third.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .parts import Parts
from .tensors import FixedTensor

# Where to, and where from.
Copies = list[tuple[Tensor, Tensor]]
# What CUDA copies fastest from.
_ALIGNMENT = 512


class Conveyor:
    """The way of layers to the device and back."""

    def __init__(self, layers: Sequence[Sequence[FixedTensor]], device: torch.device):
        """Take over layers, whose tensors are in the host's memory."""
        self._layers, self._device = layers, device
        self._incoming, self._outgoing = _Stream(device), _Stream(device)
        self._computing = _Stream(device, is_current=True)
        size = max(map(_layer_bytes, layers))
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]

    @contextmanager
    def arrived(
        self, number: int, following: int | None, *, changes: bool
    ) -> Iterator[Mapping[FixedTensor, Parts]]:
        """Give what a layer's weights are made of, on the device.

        Args:
            number: of the layer.
            following: the layer that comes next, which is brought meanwhile; None where none does.
            changes: whether logits are changed, which then go back.
        """
        slot = self._slot_of(number) or self._brought(number, but=None)
        self._computing.wait(slot.arrival)
        if following is not None and not self._slot_of(following):
            self._brought(following, but=slot)
        try:
            yield slot.parts
        finally:
            slot.departure = self._computing.now()
            if changes:
                self._outgoing.wait(slot.departure)
                self._outgoing.do(
                    [
                        copy
                        for tensor, there in slot.parts.items()
                        for copy in zip(tensor.parts.learned, there.learned, strict=True)
                    ]
                )
                slot.departure = self._outgoing.now()

    @contextmanager
    def visiting(self, tensor: FixedTensor, *, changes: bool) -> Iterator[Parts]:
        """Give what a weight that belongs to no layer is made of, on the device for a moment."""
        is_cuda = self._computing.is_cuda
        there = tensor.parts.moved(lambda t: t.to(self._device, non_blocking=is_cuda, copy=True))
        try:
            yield there
        finally:
            if changes:
                for own, changed in zip(tensor.parts.learned, there.learned, strict=True):
                    own.copy_(changed, non_blocking=is_cuda)

    def forget(self) -> None:
        """Bring all layers anew: their logits were changed in the host's memory."""
        self.settle()
        for slot in self._slots:
            slot.number = None

    def settle(self) -> None:
        """Wait until the host's memory has all that has changed."""
        self._outgoing.finish()
        self._computing.finish()

    def _slot_of(self, number: int) -> "_Slot | None":
        return next((slot for slot in self._slots if slot.number == number), None)

    def _brought(self, number: int, but: "_Slot | None") -> "_Slot":
        slot = next(slot for slot in self._slots if slot is not but)
        self._incoming.wait(slot.departure)
        self._incoming.do(slot.fill(number, self._layers[number]))
        slot.arrival = self._incoming.now()
        return slot


@dataclass
class _Slot:
    """Room for a layer's tensors.

    Attributes:
        room: bytes on the device.
        number: of the layer that is in it, or comes.
        parts: what the layer's weights are made of, here.
        arrival: when that is there.
        departure: when it is not needed any more.
    """

    room: Tensor
    number: int | None = None
    parts: dict[FixedTensor, Parts] = field(default_factory=dict)
    arrival: Any = None
    departure: Any = None

    def fill(self, number: int, layer: Sequence[FixedTensor]) -> Copies:
        """Return what is to be copied for a layer to be here."""
        copies: Copies = []
        at = 0

        def placed(own: Tensor) -> Tensor:
            nonlocal at
            there = self.room[at : at + own.nbytes].view(own.dtype).view(own.shape)
            copies.append((there, own))
            at += _aligned(own.nbytes)
            return there

        self.number = number
        self.parts = {tensor: tensor.parts.moved(placed) for tensor in layer}
        return copies


class _Stream:
    """A CUDA stream; on another device nothing, and copies are waited for."""

    def __init__(self, device: torch.device, is_current: bool = False):
        self._device, self._stream = device, None
        self.is_cuda = device.type == "cuda"
        if self.is_cuda and not is_current:
            self._stream = torch.cuda.Stream(device)

    def do(self, copies: Copies) -> None:
        """Ask for copies, in their order."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for there, own in copies:
                there.copy_(own, non_blocking=self.is_cuda)

    def now(self) -> Any:
        """Return an event that has happened when all is done that was asked for so far."""
        return self._own.record_event() if self.is_cuda else None

    def wait(self, event: Any) -> None:
        """Let what is asked for from now on wait for an event; None has happened."""
        if event is not None:
            self._own.wait_event(event)

    def finish(self) -> None:
        if self.is_cuda:
            self._own.synchronize()

    @property
    def _own(self) -> Any:
        return self._stream or torch.cuda.current_stream(self._device)


def _layer_bytes(layer: Sequence[FixedTensor]) -> int:
    sizes: list[int] = []

    def counted(own: Tensor) -> Tensor:
        sizes.append(_aligned(own.nbytes))
        return own

    for tensor in layer:
        tensor.parts.moved(counted)
    return sum(sizes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
