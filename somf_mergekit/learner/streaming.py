"""The engine that has one layer's weights in memory at a time."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import ALONE, Processes
from .conveyor import Conveyor, LearnedTensor
from .engine import Part, TokenLogProbs, Updates, agreed, autocast_to
from .layers import StreamingImpossible, layer_of_weights, layers_of
from .logprobs import TokenBatch, answer_token_log_probs, output_head, token_batch
from .tensors import Content, FixedTensor, MaskedTensor, State

# Tokens that go through a layer before the next one is brought.
GROUP_TOKENS = 1 << 15


@dataclass
class _Call:
    """What a model passes to one of its layers, by number, beside the hidden states."""

    number: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


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
        self._model, self._autocast_type, self._together = model, autocast, together
        self._layers = layers_of(model)
        place = layer_of_weights(model, self._layers)
        weights: list[LearnedTensor] = [*tensors, *fixed]
        self._of_layer = [
            [tensor for tensor in weights if place.get(id(tensor.weight)) == number]
            for number in range(len(self._layers))
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
        self._write_outer(State(Content.BASE))
        self._probe = token_batch([([0], [0])], self.device)
        self._gives_tuples = self._probed()
        self._check_calls()
        with self._replaced(self._passing_on), autocast_to(autocast, self.device):
            self._head = output_head(model)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """See Engine."""
        self._begin(state)
        groups = list(_groups(batches))
        # Where layers are brought by several processes, all of them bring each as often.
        most = max(self._together.gathered([len(groups)]))
        for group in [*groups, *[[]] * (most - len(groups))]:
            hidden, calls = self._entered(group)
            for number in range(len(self._layers)):
                with self._loaded(number, state, self._after(number)):
                    hidden = self._through(number, hidden, calls)
            for batch, last in zip(group, hidden, strict=True):
                yield self._log_probs(batch, last)

    def learn(self, parts: Sequence[Part], step: int, rate_share: float) -> None:
        """See Engine."""
        state = State(Content.SAMPLE, step)
        self._begin(state)
        self._outer_updates.begin(step, rate_share)
        batches = [part.batch for part in parts]
        with torch.no_grad():
            first, calls = self._entered(batches)
            kept = [first]
            for number in range(len(self._layers)):
                with self._loaded(number, state, self._after(number)):
                    kept.append(self._through(number, kept[-1], calls))
        with agreed(self._together, step, self.device):
            gradients = self._loss_gradients(parts, kept.pop())
        for number in reversed(range(len(self._layers))):
            self._updates[number].begin(step, rate_share)
            with self._loaded(number, state, number - 1 if number else None, changes=True):
                gradients = self._back_through(number, kept.pop(), calls, gradients)
                self._updates[number].finish()
        self._into_embeddings(batches, gradients)
        self._outer_updates.finish()
        if self._conveyor:
            self._conveyor.settle()

    def _loss_gradients(self, parts: Sequence[Part], hidden: list[Tensor]) -> list[Tensor]:
        """Return the losses' gradients at the last layer's output, for each micro-batch."""
        gradients = []
        for part, last in zip(parts, hidden, strict=True):
            leaf = last.detach().requires_grad_()
            part.loss(*self._log_probs(part.batch, _no_leaf(leaf))).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        return gradients

    def _back_through(
        self,
        number: int,
        hidden: list[Tensor],
        calls: list[list[_Call]],
        gradients: list[Tensor],
    ) -> list[Tensor]:
        """Run a layer again on its inputs and back; return the gradients at its inputs."""
        found = []
        for place, (entering, gradient) in enumerate(zip(hidden, gradients, strict=True), 1):
            leaf = entering.detach().requires_grad_()
            output = self._called(number, _no_leaf(leaf), calls[place - 1][number])
            if place == len(hidden):
                self._updates[number].gradients_end()
            output.backward(gradient)
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    def _into_embeddings(self, batches: list[TokenBatch], gradients: list[Tensor]) -> None:
        """Take the gradients at the first layer's input to what comes before it."""
        for batch, gradient in zip(batches, gradients, strict=True):
            hidden, _ = self._entered([batch])
            if hidden[0].requires_grad:
                hidden[0].backward(gradient)

    def _entered(self, batches: Sequence[TokenBatch]) -> tuple[list[Tensor], list[list[_Call]]]:
        """Return the first layer's inputs, and all layers' calls, for each micro-batch."""
        hidden, calls = [], []
        for batch in batches:
            entering: list[Tensor] = []
            seen: list[_Call] = []

            def noting(
                number: int, entering: list[Tensor] = entering, seen: list[_Call] = seen
            ) -> Callable[..., Any]:
                def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
                    if number == 0:
                        entering.append(hidden_states)
                    seen.append(_Call(number, arguments, keywords))
                    return self._as_output(hidden_states)

                return forward

            with self._replaced(noting), autocast_to(self._autocast_type, self.device):
                self._model.base_model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    use_cache=False,
                )
            hidden += entering
            calls.append(seen)
        return hidden, calls

    def _through(self, number: int, hidden: list[Tensor], calls: list[list[_Call]]) -> list[Tensor]:
        pairs = zip(hidden, calls, strict=True)
        return [self._called(number, entering, seen[number]) for entering, seen in pairs]

    def _called(self, number: int, hidden: Tensor, call: _Call) -> Tensor:
        with autocast_to(self._autocast_type, self.device):
            output = self._layers[number](hidden, *call.arguments, **call.keywords)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _log_probs(self, batch: TokenBatch, last: Tensor) -> TokenLogProbs:
        """Return what the model makes of the last layer's output."""

        def giving_last(number: int) -> Callable[..., Any]:
            given = last if number == len(self._layers) - 1 else None
            return self._passing_on(number, given)

        with self._replaced(giving_last), autocast_to(self._autocast_type, self.device):
            return answer_token_log_probs(self._model, self._head, batch)

    def _passing_on(self, number: int, given: Tensor | None = None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
            return self._as_output(hidden_states if given is None else given)

        return forward

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._gives_tuples else hidden

    @contextmanager
    def _replaced(self, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Let the layers do something else."""
        for number, layer in enumerate(self._layers):
            layer.forward = forward_of(number)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

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

    def _after(self, number: int) -> int | None:
        return number + 1 if number + 1 < len(self._layers) else None

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

    def _probed(self) -> bool:
        """Return whether layers give tuples."""
        outputs: list[Any] = []

        class Known(Exception):
            pass

        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs.append(output)
            raise Known

        hook = self._layers[0].register_forward_hook(note)
        try:
            with (
                torch.no_grad(),
                self._loaded(0, State(Content.BASE)),
                autocast_to(self._autocast_type, self.device),
            ):
                self._model.base_model(input_ids=self._probe.input_ids, use_cache=False)
        except Known:
            pass
        finally:
            hook.remove()
        return isinstance(outputs[0], tuple)

    def _check_calls(self) -> None:
        """Check that hidden states go through all layers, and are all that is learned through.

        Raises:
            StreamingImpossible: they do not, or are not.
        """
        _, (calls,) = self._entered([self._probe])
        if [call.number for call in calls] != list(range(len(self._layers))):
            raise StreamingImpossible(
                f"{type(self._model).__name__} does not call its layers one after another"
            )
        if any(map(_requires_gradient, calls)):
            raise StreamingImpossible(
                f"{type(self._model).__name__} gives its layers more than hidden states to learn "
                "through"
            )


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


def _requires_gradient(call: _Call) -> bool:
    values: list[Any] = [*call.arguments, *call.keywords.values()]
    nested = itertools.chain.from_iterable(v for v in values if isinstance(v, (tuple, list)))
    return any(isinstance(v, Tensor) and v.requires_grad for v in itertools.chain(values, nested))
