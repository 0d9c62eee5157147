"""The engine that has one layer's weights in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import ALONE, Processes
from ..data.logprobs import TokenBatch
from .conveyor import Conveyor
from .engine import Part, TokenLogProbs, Updates, agreed, clip_of, needs_norm
from .layered import Call, LayeredModel, layer_of_weights, layers_of
from .parts import Content, Parts, State
from .tensors import FixedTensor, MaskedTensor

# Tokens that go through a layer before the next one is brought.
GROUP_TOKENS = 1 << 15


class StreamingEngine:
    """A layer is written, all micro-batches go through it, and its memory is freed.

    Between layers, only hidden states stay in memory. On the way back each layer is computed again,
    its gradients are completed, and its logits updated while it is there. What is outside the
    layers (embeddings, last norm, head) stays in memory.
    """

    def __init__(
        self,
        model: Any,
        tensors: Sequence[MaskedTensor],
        fixed: Sequence[FixedTensor],
        autocast: torch.dtype | None,
        process_group: Processes = ALONE,
    ):
        """Take over a model as ``ResidentEngine`` does; ``fixed`` are all its other weights.

        Raises:
            StreamingImpossible: it can't be run layer by layer.
        """
        self.device = next(model.parameters()).device
        self._process_group, self._tensors = process_group, tensors
        layers = layers_of(model)
        place = layer_of_weights(model, layers)
        weights: list[FixedTensor] = [*tensors, *fixed]
        self._of_layer = [
            [tensor for tensor in weights if place.get(tensor.parameter) == number]
            for number in range(len(layers))
        ]
        self._outer = [tensor for tensor in weights if tensor.parameter not in place]
        self._conveyor = (
            Conveyor(self._of_layer, self.device) if _are_elsewhere(weights, self.device) else None
        )
        self._updates = [Updates(_masked(own), process_group) for own in self._of_layer]
        self._outer_updates = Updates(_masked(self._outer), process_group)
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
        most = max(self._process_group.gathered([len(groups)]))
        for group in [*groups, *[[]] * (most - len(groups))]:
            hidden, calls = self._model.entered(group)
            for number in range(len(self._model)):
                with self._loaded(number, state, number + 1):
                    hidden = self._model.through(number, hidden, calls)
            for batch, last in zip(group, hidden, strict=True):
                yield self._model.log_probs(batch, last)

    def learn(self, parts: Sequence[Part], step: int, multiplier: float) -> None:
        """See Engine."""
        state = State(Content.SAMPLE, step)
        self._begin(state)
        outer_parts = partial(self._outer_parts, changes=True)
        self._outer_updates.begin(step, multiplier, parts_of=outer_parts)
        batches = [part.batch for part in parts]
        with torch.no_grad():
            first, calls = self._model.entered(batches)
            inputs = [first]
            for number in range(len(self._model)):
                with self._loaded(number, state, number + 1):
                    inputs.append(self._model.through(number, inputs[-1], calls))
        with agreed(self._process_group):
            last = self._loss_gradients(parts, inputs.pop())
        back = partial(self._back_through, state, multiplier, calls, last)
        if needs_norm(self._tensors):
            # The layers' gradients are computed twice, for there is no memory to hold them in.
            self._into_embeddings(batches, back(list(inputs), None, changes=False))
            clip = clip_of(self._tensors, self._process_group, self.device)
            self._outer_updates.take(clip)
            back(inputs, clip, changes=True)
        else:
            self._into_embeddings(batches, back(inputs, None, changes=True))
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
        state: State,
        multiplier: float,
        calls: list[list[Call]],
        gradients: list[Tensor],
        inputs: list[list[Tensor]],
        clip: float | None,
        *,
        changes: bool,
    ) -> list[Tensor]:
        """Run each layer again on its inputs and back; return the gradients at the first's inputs.

        Args:
            state: of the weights.
            multiplier: of the learning rate.
            calls: of the layers, for each micro-batch.
            gradients: at the last layer's output, for each micro-batch.
            inputs: of each layer, for each micro-batch; emptied, so that memory gets free.
            clip: for AdamW; None where it is not known yet.
            changes: whether logits are changed.
        """
        for number in reversed(range(len(self._model))):
            updates = self._updates[number]
            with self._loaded(number, state, number - 1, changes=changes) as parts:
                updates.begin(state.step, multiplier, clip, partial(_parts_in, parts))
                gradients = self._back_through_layer(number, inputs.pop(), calls, gradients)
                updates.finish()
                updates.drop()
        return gradients

    def _back_through_layer(
        self,
        number: int,
        inputs: list[Tensor],
        calls: list[list[Call]],
        gradients: list[Tensor],
    ) -> list[Tensor]:
        found = []
        for place, (entering, gradient) in enumerate(zip(inputs, gradients, strict=True), 1):
            leaf = entering.detach().requires_grad_()
            output = self._model.called(number, _no_leaf(leaf), calls[place - 1][number])
            if place == len(inputs):
                self._updates[number].gradients_end()
            output.backward(gradient)
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    def _into_embeddings(self, batches: list[TokenBatch], gradients: list[Tensor]) -> None:
        """Take the gradients at the first layer's input to what comes before it, and update it."""
        for batch, gradient in zip(batches, gradients, strict=True):
            hidden, _ = self._model.entered([batch])
            if hidden[0].requires_grad:
                hidden[0].backward(gradient)
        self._outer_updates.finish()

    @contextmanager
    def _loaded(
        self, number: int, state: State, following: int = -1, *, changes: bool = False
    ) -> Iterator[Mapping[FixedTensor, Parts]]:
        """Let a layer have its weights, and give what they are made of, where it is computed with.

        Args:
            number: of the layer.
            state: of its weights.
            following: the layer that comes next, if there is one of that number.
            changes: whether logits are changed.
        """
        own = self._of_layer[number]
        with self._arrived(number, following, changes=changes) as parts:
            self._give_memory(own)
            for tensor in own:
                tensor.write(state, parts[tensor])
            try:
                yield parts
            finally:
                self._free(own)

    def _arrived(
        self, number: int, following: int, *, changes: bool
    ) -> AbstractContextManager[Mapping[FixedTensor, Parts]]:
        if not self._conveyor:
            return nullcontext({tensor: tensor.parts for tensor in self._of_layer[number]})
        next_one = following if following in range(len(self._of_layer)) else None
        return self._conveyor.arrived(number, next_one, changes=changes)

    def _begin(self, state: State) -> None:
        if self._conveyor:
            self._conveyor.forget()
        self._write_outer(state)

    def _write_outer(self, state: State) -> None:
        for tensor in self._outer:
            with self._outer_parts(tensor, changes=False) as parts:
                tensor.write(state, parts)

    def _outer_parts(self, tensor: FixedTensor, *, changes: bool) -> AbstractContextManager[Parts]:
        """Give what an outer weight is made of, where it is computed with."""
        if not self._conveyor:
            return nullcontext(tensor.parts)
        return self._conveyor.visiting(tensor, changes=changes)

    def _give_memory(self, tensors: Sequence[FixedTensor]) -> None:
        for parameter in {tensor.parameter for tensor in tensors}:
            parameter.untyped_storage().resize_(parameter.nbytes)

    def _free(self, tensors: Sequence[FixedTensor]) -> None:
        for parameter in {tensor.parameter for tensor in tensors}:
            parameter.untyped_storage().resize_(0)


def _are_elsewhere(weights: Iterable[FixedTensor], device: torch.device) -> bool:
    """Return whether what weights are made of is not where the model is."""
    return any(tensor.parts.base.device != device for tensor in weights)


def _parts_in(
    parts: Mapping[FixedTensor, Parts], tensor: FixedTensor
) -> AbstractContextManager[Parts]:
    return nullcontext(parts[tensor])


def _no_leaf(tensor: Tensor) -> Tensor:
    # Autocast would turn a leaf into its type once for all uses, and so add up gradients in it.
    return tensor.view_as(tensor)


def _masked(tensors: Iterable[FixedTensor]) -> list[MaskedTensor]:
    return [tensor for tensor in tensors if isinstance(tensor, MaskedTensor)]


def _groups(batches: Iterable[TokenBatch]) -> Iterator[list[TokenBatch]]:
    """Group batches until their tokens are many."""
    group: list[TokenBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(one.input_ids.numel() for one in group) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group
