"""A model in parts: what comes before its layers, each layer alone, and what follows the last."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.model_classes import text_decoder
from ..data.logprobs import TokenBatch, answer_token_log_probs, output_head, token_batch
from .engine import TokenLogProbs, autocast_to

# What takes a layer's place: hidden states in, and whatever else the model passes.
Forward = Callable[..., Any]


class StreamingImpossible(ValueError):
    """The model isn't an embedding, layers one after another, and a head."""


@dataclass
class Call:
    """What a model passes to one of its layers, by number, beside the hidden states."""

    number: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of a model, in their order.

    Raises:
        StreamingImpossible: there is not one list of layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        module
        for module in text_decoder(model).modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise StreamingImpossible(
            f"{type(model).__name__} has {len(found)} lists of layers, not one"
        )
    return list(found[0])


def layer_of_weights(model: Any, layers: Sequence[nn.Module]) -> dict[Tensor, int]:
    """Return the layer of each weight that is in one.

    Raises:
        StreamingImpossible: layers share weights, with each other or with what is outside them.
    """
    place: dict[Tensor, int] = {}
    for number, layer in enumerate(layers):
        for weight in layer.parameters():
            if place.setdefault(weight, number) != number:
                raise StreamingImpossible(f"layers of {type(model).__name__} share weights")
    inside = {module for layer in layers for module in layer.modules()}
    for module in set(model.modules()) - inside:
        if any(weight in place for weight in module.parameters(recurse=False)):
            raise StreamingImpossible(f"layers of {type(model).__name__} share weights with others")
    return place


class LayeredModel:
    """Runs a model's parts one by one: the model runs, while its layers do something else."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], autocast: torch.dtype | None):
        """Take a model and its layers, of which the first has its weights now.

        Raises:
            StreamingImpossible: hidden states don't go through the layers one after another, or
                are not all that is learned through.
        """
        self.device = next(model.parameters()).device
        self._model, self._layers, self._autocast_type = model, layers, autocast
        probe = token_batch([([0], [0])], self.device)
        # What a layer gives beside hidden states; None where it gives these alone.
        self._beside: tuple[Any, ...] | None = None
        self._note_form(probe)
        self._check_calls(probe)
        with self._replaced(lambda number: self._as_output), self._autocast():
            self._head = output_head(model)

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self._layers)

    def entered(self, batches: Sequence[TokenBatch]) -> tuple[list[Tensor], list[list[Call]]]:
        """Return the first layer's inputs, and all layers' calls, for each micro-batch."""
        hidden: list[Tensor] = []
        calls: list[list[Call]] = [[] for _ in batches]
        for batch, seen in zip(batches, calls, strict=True):

            def noting(number: int, seen: list[Call] = seen) -> Forward:
                def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
                    if number == 0:
                        hidden.append(hidden_states)
                    seen.append(Call(number, arguments, keywords))
                    return self._as_output(hidden_states)

                return forward

            with self._replaced(noting), self._autocast():
                text_decoder(self._model)(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    use_cache=False,
                )
        return hidden, calls

    def through(self, number: int, hidden: list[Tensor], calls: list[list[Call]]) -> list[Tensor]:
        """Return a layer's outputs for the inputs and the calls of several micro-batches."""
        pairs = zip(hidden, calls, strict=True)
        return [self.called(number, entering, seen[number]) for entering, seen in pairs]

    def called(self, number: int, hidden: Tensor, call: Call) -> Tensor:
        """Return a layer's output for one input, and what else the model passes to it."""
        with self._autocast():
            output = self._layers[number](hidden, *call.arguments, **call.keywords)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def log_probs(self, batch: TokenBatch, last: Tensor) -> TokenLogProbs:
        """Return what the model makes of the last layer's output."""

        def giving_last(number: int) -> Forward:
            is_last = number == len(self._layers) - 1

            def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                return self._as_output(last if is_last else hidden_states)

            return forward

        with self._replaced(giving_last), self._autocast():
            return answer_token_log_probs(self._model, self._head, batch)

    def _as_output(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return hidden states in the form in which layers give them; as a layer, do nothing."""
        return hidden_states if self._beside is None else (hidden_states, *self._beside)

    @contextmanager
    def _replaced(self, forward_of: Callable[[int], Forward]) -> Iterator[None]:
        """Let the layers do something else."""
        # A layer may have a forward of its own, which some libraries wrap around its class'.
        own = [vars(layer).get("forward") for layer in self._layers]
        try:
            for number, layer in enumerate(self._layers):
                layer.forward = forward_of(number)
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = forward

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast_to(self._autocast_type, self.device)

    def _note_form(self, probe: TokenBatch) -> None:
        """Note in which form layers give hidden states, by what the first one gives."""
        first = self._layers[0].forward

        def noting(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
            output = first(hidden_states, *arguments, **keywords)
            if isinstance(output, tuple):
                self._beside = (None,) * (len(output) - 1)
            return output

        def forward_of(number: int) -> Forward:
            return self._as_output if number else noting

        with self._replaced(forward_of), self._autocast(), torch.no_grad():
            text_decoder(self._model)(input_ids=probe.input_ids, use_cache=False)

    def _check_calls(self, probe: TokenBatch) -> None:
        """Check that hidden states go through all layers, and are all that is learned through.

        Raises:
            StreamingImpossible: they do not, or are not.
        """
        name = type(self._model).__name__
        _, (calls,) = self.entered([probe])
        if [call.number for call in calls] != list(range(len(self._layers))):
            raise StreamingImpossible(f"{name} does not call its layers one after another")
        if any(map(_requires_gradient, calls)):
            raise StreamingImpossible(
                f"{name} gives its layers more than hidden states to learn through"
            )


def _requires_gradient(call: Call) -> bool:
    values: list[Any] = [*call.arguments, *call.keywords.values()]
    nested = itertools.chain.from_iterable(v for v in values if isinstance(v, (tuple, list)))
    return any(isinstance(v, Tensor) and v.requires_grad for v in itertools.chain(values, nested))
