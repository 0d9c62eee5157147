"""A model in parts: what comes before its layers, each layer alone, and what follows the last."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.logprobs import TokenBatch, answer_token_log_probs, output_head, token_batch
from .engine import TokenLogProbs, autocast_to
from .layers import StreamingImpossible


@dataclass
class Call:
    """What a model passes to one of its layers, by number, beside the hidden states."""

    number: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


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
        self._gives_tuples = self._probed(probe)
        self._check_calls(probe)
        with self._replaced(self._passing_on), self._autocast():
            self._head = output_head(model)

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self._layers)

    def entered(self, batches: Sequence[TokenBatch]) -> tuple[list[Tensor], list[list[Call]]]:
        """Return the first layer's inputs, and all layers' calls, for each micro-batch."""
        hidden, calls = [], []
        for batch in batches:
            entering: list[Tensor] = []
            seen: list[Call] = []

            def noting(
                number: int, entering: list[Tensor] = entering, seen: list[Call] = seen
            ) -> Callable[..., Any]:
                def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
                    if number == 0:
                        entering.append(hidden_states)
                    seen.append(Call(number, arguments, keywords))
                    return self._as_output(hidden_states)

                return forward

            with self._replaced(noting), self._autocast():
                self._model.base_model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    use_cache=False,
                )
            hidden += entering
            calls.append(seen)
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

        def giving_last(number: int) -> Callable[..., Any]:
            given = last if number == len(self._layers) - 1 else None
            return self._passing_on(number, given)

        with self._replaced(giving_last), self._autocast():
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

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast_to(self._autocast_type, self.device)

    def _probed(self, probe: TokenBatch) -> bool:
        """Return whether layers give tuples."""
        outputs: list[Any] = []

        class Known(Exception):
            pass

        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs.append(output)
            raise Known

        hook = self._layers[0].register_forward_hook(note)
        try:
            with torch.no_grad(), self._autocast():
                self._model.base_model(input_ids=probe.input_ids, use_cache=False)
        except Known:
            pass
        finally:
            hook.remove()
        return isinstance(outputs[0], tuple)

    def _check_calls(self, probe: TokenBatch) -> None:
        """Check that hidden states go through all layers, and are all that is learned through.

        Raises:
            StreamingImpossible: they do not, or are not.
        """
        _, (calls,) = self.entered([probe])
        if [call.number for call in calls] != list(range(len(self._layers))):
            raise StreamingImpossible(
                f"{type(self._model).__name__} does not call its layers one after another"
            )
        if any(map(_requires_gradient, calls)):
            raise StreamingImpossible(
                f"{type(self._model).__name__} gives its layers more than hidden states to learn "
                "through"
            )


def _requires_gradient(call: Call) -> bool:
    values: list[Any] = [*call.arguments, *call.keywords.values()]
    nested = itertools.chain.from_iterable(v for v in values if isinstance(v, (tuple, list)))
    return any(isinstance(v, Tensor) and v.requires_grad for v in itertools.chain(values, nested))
