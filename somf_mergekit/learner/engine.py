"""How the model's passes are run: where its weights are, and when the logits are updated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common.process_group import ALONE, Processes
from ..data.logprobs import TokenBatch, answer_token_log_probs, output_head
from .optimizer import LogitGradient, clip_factor
from .parts import Content, Parts, State
from .stopping import LearningDiverged
from .tensors import FixedTensor, MaskedTensor

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


class Engine(Protocol):
    """Runs the passes. An engine changes time and memory, and of the result the last digits alone.

    Not even these on the CPU in one process, but where tied embeddings get gradients from several
    micro-batches: the order in which those are added up with the head's is the engine's.
    """

    device: torch.device

    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """Yield the log-probabilities of each batch's answers with the weights in ``state``."""

    def learn(self, parts: Sequence[Part], step: int, multiplier: float) -> None:
        """Take an optimiser step on the logits: the sum of the parts' losses goes down.

        Args:
            parts: micro-batches of this process; every loss is computed before any logit is
                changed.
            step: whose sample the weights are under.
            multiplier: of the learning rate, from 0 to 1.

        Raises:
            LearningDiverged: a loss raised it, here or in another process.
        """


# Gives what a weight is made of, as long as it is computed with.
PartsOf = Callable[[MaskedTensor], AbstractContextManager[Parts]]


def own_parts(tensor: MaskedTensor) -> AbstractContextManager[Parts]:
    """Give a tensor's own parts: they are where the model is."""
    return nullcontext(tensor.parts)


class Updates:
    """Updates each tensor as soon as its gradient is complete, so that few exist at once.

    Where several processes learn, it is complete when all have added theirs. AdamW clips the norm
    of the gradient of all tensors, so that under it gradients wait for that norm.
    """

    def __init__(self, tensors: Sequence[MaskedTensor], process_group: Processes):
        """Take over tensors, whose weights get gradients from now on."""
        self._tensors, self._process_group = tensors, process_group
        self._waiting: list[tuple[MaskedTensor, list[LogitGradient]]] = []
        self._are_last = False
        self._of_parameter: dict[Tensor, list[MaskedTensor]] = {}
        for tensor in tensors:
            self._of_parameter.setdefault(tensor.parameter, []).append(tensor)
        for parameter in self._of_parameter:
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def begin(
        self,
        step: int,
        multiplier: float,
        clip: float | None = None,
        parts_of: PartsOf = own_parts,
    ) -> None:
        """Wait for the gradients of a step.

        Args:
            step: its number.
            multiplier: of the learning rate.
            clip: for AdamW, see ``optimizer.clip_factor``; None where it is not known yet.
            parts_of: gives what a tensor's gradient and step are computed with.
        """
        self._step, self._multiplier, self._clip, self._parts_of = step, multiplier, clip, parts_of
        self._are_last = False
        self.drop()
        for tensor in self._tensors:
            # A step that was broken off leaves some.
            tensor.parameter.grad = tensor.gradient_square = None

    def gradients_end(self) -> None:
        """From now on, a gradient is complete when it comes."""
        self._are_last = self._process_group.count == 1

    def finish(self) -> None:
        """Update what is not yet."""
        for parameter, tensors in self._of_parameter.items():
            for tensor in tensors:
                if tensor.gradient_square is not None:
                    continue
                if parameter.grad is None:
                    # Experts that no token went to.
                    own = torch.zeros_like(tensor.weight)
                else:
                    own = tensor.slice.of(parameter.grad)
                if self._process_group.count > 1:
                    if tensor.shard.is_whole:
                        own = self._process_group.add_up(own).to(own.dtype)
                    else:
                        own = tensor.shard.own_sum(own)
                self._update(tensor, own)
            parameter.grad = None

    def take(self, clip: float) -> None:
        """Take the steps that wait."""
        for tensor, found in self._waiting:
            with self._parts_of(tensor) as parts:
                tensor.adamw_step(found, self._step, self._multiplier, clip, parts)
        self.drop()

    def drop(self) -> None:
        """Forget the steps that wait."""
        self._waiting.clear()

    def _accumulated(self, parameter: Tensor) -> None:
        if self._are_last:
            assert parameter.grad is not None
            for tensor in self._of_parameter[parameter]:
                self._update(tensor, tensor.slice.of(parameter.grad))
            parameter.grad = None

    def _update(self, tensor: MaskedTensor, gradient: Tensor) -> None:
        with self._parts_of(tensor) as parts:
            if parts.masks[0].moments is None:
                tensor.update(gradient, self._step, self._multiplier, parts)
            else:
                found = tensor.logit_gradients(gradient, self._step, parts)
                if self._clip is None:
                    self._waiting.append((tensor, found))
                else:
                    tensor.adamw_step(found, self._step, self._multiplier, self._clip, parts)


class ResidentEngine:
    """All weights stay in memory: the fastest where they fit."""

    def __init__(
        self,
        model: Any,
        tensors: Sequence[MaskedTensor],
        fixed: Sequence[FixedTensor],
        autocast: torch.dtype | None,
        process_group: Processes = ALONE,
    ):
        """Take over a model whose weights are those of ``tensors`` and ``fixed``.

        Args:
            model: a transformers causal language model.
            tensors: the weights that get a mask.
            fixed: the others; what is in neither stays as it is.
            autocast: type in which the model computes; None for that of its weights.
            process_group: this process among those that learn.
        """
        self.device = next(model.parameters()).device
        self._model, self._tensors, self._fixed = model, tensors, fixed
        self._autocast_type, self._process_group = autocast, process_group
        self._fixed_content: Content | None = None
        self._write(State(Content.BASE))
        with autocast_to(autocast, self.device):
            self._head = output_head(model)
        self._updates = Updates(tensors, process_group)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[TokenBatch], state: State) -> Iterator[TokenLogProbs]:
        """See Engine."""
        self._write(state)
        for batch in batches:
            yield self._log_probs(batch)

    def learn(self, parts: Sequence[Part], step: int, multiplier: float) -> None:
        """See Engine."""
        self._write(State(Content.SAMPLE, step))
        self._updates.begin(step, multiplier)
        with agreed(self._process_group):
            for number, part in enumerate(parts, 1):
                loss = part.loss(*self._log_probs(part.batch))
                if number == len(parts):
                    self._updates.gradients_end()
                loss.backward()
        self._updates.finish()
        if needs_norm(self._tensors):
            self._updates.take(clip_of(self._tensors, self._process_group, self.device))

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


def needs_norm(tensors: Sequence[MaskedTensor]) -> bool:
    """Return whether the optimiser needs the norm of the whole gradient before it steps."""
    return any(mask.moments is not None for tensor in tensors for mask in tensor.parts.masks)


def clip_of(
    tensors: Sequence[MaskedTensor], process_group: Processes, device: torch.device
) -> float:
    """Return ``optimizer.clip_factor`` of the latest gradients."""
    return clip_factor(float(gradient_squares(tensors, process_group, device).sum()))


def gradient_squares(
    tensors: Sequence[MaskedTensor], process_group: Processes, device: torch.device
) -> Tensor:
    """Return the squared norm of each tensor's latest logit gradient, float32, of all processes."""
    none = torch.zeros((), device=device)
    own = [none if t.gradient_square is None else t.gradient_square for t in tensors]
    # Those that every process has are added up as often as there are processes.
    counts = [process_group.count if t.is_shared else 1 for t in tensors]
    return process_group.add_up(torch.stack(own) / torch.tensor(counts, device=device))


@contextmanager
def agreed(process_group: Processes) -> Iterator[None]:
    """Raise LearningDiverged in all processes, with the rows of all, where one raises it."""
    failed = None
    try:
        yield
    except LearningDiverged as error:
        failed = error
    rows = failed and (failed.step, failed.rows, failed.utility_rows)
    found = [own for own in process_group.gathered([rows]) if own]
    if found:
        steps, rows_of_all, utility_rows = zip(*found, strict=True)
        raise LearningDiverged(
            steps[0], sorted(chain(*rows_of_all)), sorted(chain(*utility_rows))
        ) from failed


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model computes in ``dtype``; None for that of its weights."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
