"""The engine that has one layer's weights in memory at a time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import ALONE, Processes
from ..data.logprobs import TokenBatch
from .conveyor import Conveyor, LearnedTensor
from .engine import Part, TokenLogProbs, Updates, agreed, clip_of, needs_norm
from .layered import Call, LayeredModel
from .layers import layer_of_weights, layers_of
from .tensors import Content, FixedTensor, MaskedTensor, State

# Tokens that go through a layer before the next one is brought.
GROUP_TOKENS = 1 << 15


class StreamingEngine:
    """A layer is written, all micro-batches go through it, and its memory is freed.

    Between layers, hidden states alone are kept. On the way back each layer is computed again, its
    gradients are completed, and its logits updated while it is there. What is outside the layers
    (embeddings, last norm, head) stays in memory.
    """

    def __init__(
        self,
        model: Any,
        tensors: Sequence[MaskedTensor],
        fixed: Sequence[FixedTensor],
        autocast: torch.dtype | None,
        together: Processes = ALONE,
    ):
        """Take over a model as ``ResidentEngine`` does; ``fixed`` are all its other weights.

        Raises:
            StreamingImpossible: it can't be run layer by layer.
        """
        self.device = next(model.parameters()).device
        self._together, self._tensors = together, tensors
        layers = layers_of(model)
        place = layer_of_weights(model, layers)
        weights: list[LearnedTensor] = [*tensors, *fixed]
        self._of_layer = [
            [tensor for tensor in weights if place.get(id(tensor.weight)) == number]
            for number in range(len(layers))
        ]
        self._outer = [tensor for tensor in weights if id(tensor.weight) not in place]
        self._conveyor = (
            Conveyor(self._of_layer, self.device) if _are_elsewhere(weights, self.device) else None
        )
        self._updates = [Updates(_masked(own), together) for own in self._of_layer]
        changed = partial(self._at_hand, changes=True)
        self._outer_updates = Updates(_masked(self._outer), together, changed)
        for own in self._of_layer:
            self._free(own)
        self._give_memory(self._outer)
        untouched = State(Content.BASE)
        self._write_outer(untouched)
        with self._loaded(0, untouched):
            self._model = LayeredModel(model, layers, autocast)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """See Engine."""
        self._begin(state)
        groups = list(_groups(batches))
        # Where layers are brought by several processes, all of them bring each as often.
        most = max(self._together.gathered([len(groups)]))
        for group in [*groups, *[[]] * (most - len(groups))]:
            hidden, calls = self._model.entered(group)
            for number in range(len(self._model)):
                with self._loaded(number, state, self._after(number)):
                    hidden = self._model.through(number, hidden, calls)
            for batch, last in zip(group, hidden, strict=True):
                yield self._model.log_probs(batch, last)

    def learn(self, parts: Sequence[Part], step: int, rate_share: float) -> None:
        """See Engine."""
        state = State(Content.SAMPLE, step)
        self._begin(state)
        self._outer_updates.begin(step, rate_share)
        batches = [part.batch for part in parts]
        with torch.no_grad():
            first, calls = self._model.entered(batches)
            kept = [first]
            for number in range(len(self._model)):
                with self._loaded(number, state, self._after(number)):
                    kept.append(self._model.through(number, kept[-1], calls))
        with agreed(self._together, step, self.device):
            last = self._loss_gradients(parts, kept.pop())
        clip = None
        if needs_norm(self._tensors):
            # The layers' gradients are computed twice, for there is no memory to keep them in.
            gradients = last
            for number in reversed(range(len(self._model))):
                self._updates[number].begin(step, rate_share)
                with self._loaded(number, state, self._before(number)):
                    gradients = self._back_through(number, kept[number], calls, gradients)
                    self._updates[number].finish()
                    self._updates[number].drop()
            self._into_embeddings(batches, gradients)
            self._outer_updates.finish()
            clip = clip_of(self._tensors, self._together, self.device)
            self._outer_updates.take(clip)
        gradients = last
        for number in reversed(range(len(self._model))):
            self._updates[number].begin(step, rate_share, clip)
            with self._loaded(number, state, self._before(number), changes=True):
                gradients = self._back_through(number, kept.pop(), calls, gradients)
                self._updates[number].finish()
        if clip is None:
            self._into_embeddings(batches, gradients)
            self._outer_updates.finish()
        if self._conveyor:
            self._conveyor.settle()

    def _loss_gradients(self, parts: Sequence[Part], hidden: list[Tensor]) -> list[Tensor]:
        """Return the losses' gradients at the last layer's output, for each micro-batch."""
        gradients = []
        for part, last in zip(parts, hidden, strict=True):
            leaf = last.detach().requires_grad_()
            part.loss(*self._model.log_probs(part.batch, _no_leaf(leaf))).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        return gradients

    def _back_through(
        self,
        number: int,
        hidden: list[Tensor],
        calls: list[list[Call]],
        gradients: list[Tensor],
    ) -> list[Tensor]:
        """Run a layer again on its inputs and back; return the gradients at its inputs."""
        found = []
        for place, (entering, gradient) in enumerate(zip(hidden, gradients, strict=True), 1):
            leaf = entering.detach().requires_grad_()
            output = self._model.called(number, _no_leaf(leaf), calls[place - 1][number])
            if place == len(hidden):
                self._updates[number].gradients_end()
            output.backward(gradient)
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    def _into_embeddings(self, batches: list[TokenBatch], gradients: list[Tensor]) -> None:
        """Take the gradients at the first layer's input to what comes before it."""
        for batch, gradient in zip(batches, gradients, strict=True):
            hidden, _ = self._model.entered([batch])
            if hidden[0].requires_grad:
                hidden[0].backward(gradient)

    @contextmanager
    def _loaded(
        self, number: int, state: State, following: int | None = None, *, changes: bool = False
    ) -> Iterator[None]:
        """Let a layer have its weights, and what they are made of be where it is computed with."""
        own, conveyor = self._of_layer[number], self._conveyor
        with conveyor.arrived(number, following, changes=changes) if conveyor else nullcontext():
            self._give_memory(own)
            for tensor in own:
                tensor.write(state)
            try:
                yield
            finally:
                self._free(own)

    def _before(self, number: int) -> int | None:
        return number - 1 if number else None

    def _after(self, number: int) -> int | None:
        return number + 1 if number + 1 < len(self._model) else None

    def _begin(self, state: State) -> None:
        if self._conveyor:
            self._conveyor.forget()
        self._write_outer(state)

    def _write_outer(self, state: State) -> None:
        for tensor in self._outer:
            with self._at_hand(tensor, changes=False):
                tensor.write(state)

    def _at_hand(self, tensor: LearnedTensor, *, changes: bool) -> AbstractContextManager[None]:
        """Return the context in which what an outer weight is made of can be computed with."""
        if not self._conveyor:
            return nullcontext()
        return self._conveyor.visiting(tensor, changes=changes)

    def _give_memory(self, tensors: Sequence[LearnedTensor]) -> None:
        for tensor in tensors:
            tensor.weight.untyped_storage().resize_(tensor.weight.nbytes)

    def _free(self, tensors: Sequence[LearnedTensor]) -> None:
        for tensor in tensors:
            tensor.weight.untyped_storage().resize_(0)


def _are_elsewhere(weights: Iterable[LearnedTensor], device: torch.device) -> bool:
    """Return whether what weights are made of is not where the model is."""
    return any(tensor.base.device != device for tensor in weights)


def _no_leaf(tensor: Tensor) -> Tensor:
    # Autocast would turn a leaf into its type once for all uses, and so add up gradients in it.
    return tensor.view_as(tensor)


def _masked(tensors: Iterable[LearnedTensor]) -> list[MaskedTensor]:
    return [tensor for tensor in tensors if isinstance(tensor, MaskedTensor)]


def _groups(batches: Iterable[TokenBatch]) -> Iterator[list[TokenBatch]]:
    """Put batches together until their tokens are many."""
    group: list[TokenBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(one.input_ids.numel() for one in group) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group
