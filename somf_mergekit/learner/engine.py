"""How the model's passes are run: where its weights are, and when the logits are updated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..processes import ALONE, Processes
from .logprobs import TokenBatch, answer_token_log_probs, output_head
from .tensors import Content, FixedTensor, MaskedTensor, State

# Log-probabilities of the tokens of a batch's answers, and which sequence each belongs to.
TokenLogProbs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step.

    Attributes:
        batch: its sequences.
        loss: its share of the step's loss, a scalar, from the log-probabilities of its answers.
    """

    batch: TokenBatch
    loss: Callable[[Tensor, Tensor], Tensor]


class LossNotFinite(ArithmeticError):
    """The loss became NaN or infinite; the logits are those before the step that showed it."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


class Engine(Protocol):
    """Runs the passes. An engine changes time and memory, never the result."""

    device: torch.device

    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """Yield the log-probabilities of each batch's answers with the weights in ``state``."""

    def learn(self, parts: Sequence[Part], step: int, rate_share: float) -> None:
        """Take an optimiser step on the logits: the sum of the parts' losses goes down.

        Args:
            parts: micro-batches of this process; every loss is computed before any logit is
                changed.
            step: whose sample the weights are under.
            rate_share: of the learning rate at its peak, from 0 to 1.

        Raises:
            LossNotFinite: a loss raised it, here or in another process.
        """


class Updates:
    """Updates each tensor as soon as its gradient is complete, so that few exist at once.

    Where several processes learn together, it is complete when all have added theirs.
    """

    def __init__(
        self,
        tensors: Sequence[MaskedTensor],
        together: Processes,
        at_hand: Callable[[MaskedTensor], AbstractContextManager[Any]] = nullcontext,
    ):
        """Take over tensors, and the context in which what one is made of can be computed with."""
        self._tensors, self._together, self._at_hand = tensors, together, at_hand
        self._step, self._share = 0, 0.0
        self._are_last = False
        for tensor in tensors:
            tensor.weight.requires_grad_(True)
            hook = partial(self._accumulated, tensor)
            tensor.weight.register_post_accumulate_grad_hook(hook)

    def begin(self, step: int, share: float) -> None:
        """Wait for the gradients of a step, which updates with a share of the learning rate."""
        self._step, self._share, self._are_last = step, share, False
        for tensor in self._tensors:
            # A step that was broken off leaves some.
            tensor.weight.grad = tensor.gradient_square = None

    def gradients_end(self) -> None:
        """From now on, a gradient is complete when it comes."""
        self._are_last = self._together.count == 1

    def finish(self) -> None:
        """Update what is not yet."""
        for tensor in self._tensors:
            own = tensor.weight.grad
            if self._together.count > 1:
                # Experts that no token of this process went to have none.
                given = torch.zeros_like(tensor.weight) if own is None else own
                if tensor.shard.is_whole:
                    own = self._together.add_up(given).to(given.dtype)
                else:
                    own = tensor.shard.own_sum(given)
            if own is not None:
                self._update(tensor, own)

    def _accumulated(self, tensor: MaskedTensor, _: Tensor) -> None:
        if self._are_last:
            assert tensor.weight.grad is not None
            self._update(tensor, tensor.weight.grad)

    def _update(self, tensor: MaskedTensor, gradient: Tensor) -> None:
        with self._at_hand(tensor):
            tensor.update(gradient, self._step, self._share)
        tensor.weight.grad = None


class ResidentEngine:
    """All weights stay in memory: the fastest where they fit."""

    def __init__(
        self,
        model: Any,
        tensors: Sequence[MaskedTensor],
        fixed: Sequence[FixedTensor],
        autocast: torch.dtype | None,
        together: Processes = ALONE,
    ):
        """Take over a model whose weights are those of ``tensors`` and ``fixed``.

        Args:
            model: a transformers causal language model.
            tensors: the weights that get a mask.
            fixed: the others; what is in neither stays as it is.
            autocast: type in which the model computes; None for that of its weights.
            together: this process among those that learn.
        """
        self.device = next(model.parameters()).device
        self._model, self._tensors, self._fixed = model, tensors, fixed
        self._autocast_type, self._together = autocast, together
        self._fixed_content: Content | None = None
        self._write(State(Content.BASE))
        with autocast_to(autocast, self.device):
            self._head = output_head(model)
        self._updates = Updates(tensors, together)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """See Engine."""
        self._write(state)
        for batch in batches:
            yield self._log_probs(batch)

    def learn(self, parts: Sequence[Part], step: int, rate_share: float) -> None:
        """See Engine."""
        self._write(State(Content.SAMPLE, step))
        self._updates.begin(step, rate_share)
        with agreed(self._together, step, self.device):
            for number, part in enumerate(parts, 1):
                loss = part.loss(*self._log_probs(part.batch))
                if number == len(parts):
                    self._updates.gradients_end()
                loss.backward()
        self._updates.finish()

    def _log_probs(self, batch: TokenBatch) -> TokenLogProbs:
        with autocast_to(self._autocast_type, self.device):
            return answer_token_log_probs(self._model, self._head, batch)

    def _write(self, state: State) -> None:
        for tensor in self._tensors:
            tensor.write(state)
        if state.of_fixed != self._fixed_content:
            for other in self._fixed:
                other.write(state)
            self._fixed_content = state.of_fixed


@contextmanager
def agreed(together: Processes, step: int, device: torch.device) -> Iterator[None]:
    """Raise LossNotFinite in all processes where it is raised in one."""
    failed = None
    try:
        yield
    except LossNotFinite as error:
        failed = error
    if float(together.add_up(torch.tensor(float(failed is not None), device=device))):
        raise failed or LossNotFinite(step)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model computes in ``dtype``; None for that of its weights."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
