"""The learning loop: sample the mask, run the pairs, turn weight gradients into logit updates."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives import dpo_losses
from ..preferences import EncodedPair
from ..recipe import Settings
from .logprobs import answer_log_probs, output_head, token_batch
from .tensors import MaskedTensor

WARMUP_SHARE = 0.08


class LossNotFinite(ArithmeticError):
    """The loss became NaN or infinite; the logits are those before the step that showed it."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


@dataclass(frozen=True)
class LearningProblem:
    """Everything a mask is learned from.

    Attributes:
        model: a transformers causal language model in float32, whose masked weights are those of
            ``tensors``; all other weights stay as they are.
        tensors: the weights that get a mask.
        pairs: tokenised preference pairs, in the order of the first epoch.
        settings: of the recipe.
        autocast: type in which the model computes; None for float32.
        micro_batch: pairs that go through the model at once.
    """

    model: Any
    tensors: Sequence[MaskedTensor]
    pairs: Sequence[EncodedPair]
    settings: Settings
    autocast: torch.dtype | None
    micro_batch: int


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step showed, on its own pairs and under its own sample of the mask."""

    step: int
    steps: int
    loss: float
    accuracy: float
    margin: float
    learning_rate: float
    seconds: float


def step_count(settings: Settings, pairs: int) -> int:
    """Return the optimiser steps of a recipe with that many pairs."""
    steps = settings.epochs * math.ceil(pairs / settings.batch_size)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def batches(pairs: int, settings: Settings, steps: int) -> Iterator[list[int]]:
    """Yield the indices of each step's pairs; later epochs come in orders of their own."""
    order, epoch = list(range(pairs)), 0
    for _ in range(steps):
        if not order:
            epoch += 1
            order = list(range(pairs))
            random.Random(f"{settings.seed}/{epoch}").shuffle(order)
        yield order[: settings.batch_size]
        order = order[settings.batch_size :]


def learn_logits(
    problem: LearningProblem,
    on_step: Callable[[StepReport], None],
    on_reference: Callable[[int], None],
) -> None:
    """Learn the logits of ``problem.tensors`` in place.

    Args:
        problem: see LearningProblem.
        on_step: called after each optimiser step.
        on_reference: called while the reference's log-probabilities are computed, with the number
            of pairs that are done.

    Raises:
        LossNotFinite: before the update of the step whose loss is not finite.
    """
    settings, model = problem.settings, problem.model
    steps = step_count(settings, len(problem.pairs))
    if steps == 0:
        return
    plan = list(batches(len(problem.pairs), settings, steps))
    head = output_head(model)
    for tensor in problem.tensors:
        tensor.write_base() if settings.reference == "base" else tensor.write_soft()
    reference = _reference_log_probs(problem, head, sorted(set().union(*plan)), on_reference)
    for tensor in problem.tensors:
        tensor.weight.requires_grad_(True)
    for step, batch in enumerate(plan):
        start = time.perf_counter()
        for tensor in problem.tensors:
            tensor.write_sample(step)
        losses, margins = [], []
        for rows in _micro_batches(batch, problem):
            loss, margin = _dpo(problem, head, rows, reference)
            if not torch.isfinite(loss).all():
                raise LossNotFinite(step)
            (loss.sum() / len(batch)).backward()
            losses += loss.tolist()
            margins += margin.tolist()
        rate = learning_rate_at(step, steps, settings.learning_rate)
        for tensor in problem.tensors:
            tensor.update(step, rate)
        on_step(
            StepReport(
                step=step + 1,
                steps=steps,
                loss=sum(losses) / len(losses),
                accuracy=sum(margin > 0 for margin in margins) / len(margins),
                margin=sum(margins) / len(margins),
                learning_rate=rate,
                seconds=time.perf_counter() - start,
            )
        )


def _dpo(
    problem: LearningProblem, head: Any, rows: list[int], reference: dict[int, tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    chosen, rejected = _pair_log_probs(problem, head, rows)
    fixed = torch.tensor([reference[row] for row in rows], device=chosen.device)
    return dpo_losses(chosen, rejected, fixed[:, 0], fixed[:, 1], problem.settings.beta)


@torch.no_grad()
def _reference_log_probs(
    problem: LearningProblem, head: Any, rows: list[int], on_reference: Callable[[int], None]
) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for part in _micro_batches(rows, problem):
        chosen, rejected = _pair_log_probs(problem, head, part)
        found.update(zip(part, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        on_reference(len(found))
    return found


def _pair_log_probs(problem: LearningProblem, head: Any, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the safe and of the unsafe answers, (rows,) each."""
    pairs = [problem.pairs[row] for row in rows]
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    device = next(problem.model.parameters()).device
    with _autocast(problem, device):
        sums, _ = answer_log_probs(problem.model, head, token_batch(sequences, device))
    return sums[: len(rows)], sums[len(rows) :]


def _micro_batches(rows: list[int], problem: LearningProblem) -> Iterator[list[int]]:
    """Cut rows into micro-batches of like length, so that little of them is padding."""
    order = sorted(rows, key=lambda row: _length(problem.pairs[row]))
    for start in range(0, len(order), problem.micro_batch):
        yield order[start : start + problem.micro_batch]


def _length(pair: EncodedPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _autocast(problem: LearningProblem, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=problem.autocast, enabled=problem.autocast is not None)
