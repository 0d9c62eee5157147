"""Brings what weights are made of from the host's memory to a GPU, before it is needed.

A layer's tensors go into one of two slots on the GPU. While the layer in one slot is computed with,
the next one's come into the other, on a stream of their own, and changed logits go back on a third.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import FixedTensor, MaskedTensor

LearnedTensor = MaskedTensor | FixedTensor
# Where to, and where from.
Copies = list[tuple[Tensor, Tensor]]
# What CUDA copies fastest from.
_ALIGNMENT = 512


class Conveyor:
    """The way of layers to the device and back. What is on it is told by ``arrived``."""

    def __init__(self, layers: Sequence[Sequence[LearnedTensor]], device: torch.device):
        """Take over layers, whose tensors are in the host's memory."""
        self._layers, self._device = layers, device
        self._incoming, self._outgoing = _Stream(device), _Stream(device)
        self._computing = _Stream(device, is_current=True)
        size = max(map(_layer_bytes, layers))
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]

    @contextmanager
    def arrived(self, number: int, following: int | None, *, changes: bool) -> Iterator[None]:
        """Let a layer's tensors be on the device.

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
            with ExitStack() as away:
                for tensor in self._layers[number]:
                    away.enter_context(_away(tensor, slot.moved))
                yield
        finally:
            done = self._computing.now()
            slot.departure = self._sent_back(number, slot, done) if changes else done

    @contextmanager
    def visiting(self, tensor: LearnedTensor, *, changes: bool) -> Iterator[None]:
        """Let one tensor that belongs to no layer be on the device for a moment."""
        copies: dict[int, Tensor] = {}

        def moved(own: Tensor) -> Tensor:
            if id(own) not in copies:
                copies[id(own)] = own.to(
                    self._device, non_blocking=self._computing.is_cuda, copy=True
                )
            return copies[id(own)]

        try:
            with _away(tensor, moved):
                yield
        finally:
            if changes and isinstance(tensor, MaskedTensor):
                for own in _changing(tensor):
                    own.copy_(copies[id(own)], non_blocking=self._computing.is_cuda)

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

    def _sent_back(self, number: int, slot: "_Slot", done: Any) -> Any:
        masked = [tensor for tensor in self._layers[number] if isinstance(tensor, MaskedTensor)]
        copies = [(own, slot.moved(own)) for tensor in masked for own in _changing(tensor)]
        self._outgoing.wait(done)
        self._outgoing.do(copies)
        return self._outgoing.now()


@dataclass
class _Slot:
    """Room for a layer's tensors.

    Attributes:
        room: bytes on the device.
        number: of the layer that is in it, or comes.
        arrival: when that is there.
        departure: when it is not needed any more.
    """

    room: Tensor
    number: int | None = None
    arrival: Any = None
    departure: Any = None
    _copies: dict[int, Tensor] = field(default_factory=dict)

    def fill(self, number: int, layer: Sequence[LearnedTensor]) -> Copies:
        """Return what is to be copied for a layer to be here."""
        self.number, self._copies, at = number, {}, 0
        copies = []
        for own in _distinct(layer):
            there = self.room[at : at + own.nbytes].view(own.dtype).view(own.shape)
            self._copies[id(own)] = there
            copies.append((there, own))
            at += _aligned(own.nbytes)
        return copies

    def moved(self, own: Tensor) -> Tensor:
        """Return what stands for a tensor of the host's memory on the device."""
        return self._copies[id(own)]


@contextmanager
def _away(tensor: LearnedTensor, moved: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a weight be made of what ``moved`` gives in the place of its own parts."""
    there = _parts(tensor, moved)
    home = {name: getattr(tensor, name) for name in there}
    vars(tensor).update(there)
    try:
        yield
    finally:
        vars(tensor).update(home)


def _parts(tensor: LearnedTensor, moved: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return what a weight is made of, by attribute, with ``moved`` applied to each tensor."""
    found = {"base": moved(tensor.base), "merged": tensor.merged and tensor.merged.kept(moved)}
    if isinstance(tensor, MaskedTensor):
        found["logits"] = moved(tensor.logits)
        found["moments"] = None if tensor.moments is None else moved(tensor.moments)
    return found


def _changing(tensor: MaskedTensor) -> list[Tensor]:
    """Return what a step changes of a weight."""
    return [own for own in (tensor.logits, tensor.moments) if own is not None]


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


def _distinct(layer: Sequence[LearnedTensor]) -> list[Tensor]:
    """Return the tensors that a layer's weights are made of, each once."""
    found: dict[int, Tensor] = {}
    for tensor in layer:
        _parts(tensor, lambda own: found.setdefault(id(own), own))
    return list(found.values())


def _layer_bytes(layer: Sequence[LearnedTensor]) -> int:
    return sum(_aligned(own.nbytes) for own in _distinct(layer))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
