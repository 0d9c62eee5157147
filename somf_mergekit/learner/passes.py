"""The passes of learning through the model, and what their losses are compared with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..answers import EncodedAnswer
from ..objectives import PREFERENCES, divergences, preference_losses, sft_losses
from ..preferences import EncodedPair
from ..recipe import Settings
from .logprobs import answer_log_probs, answer_token_log_probs, output_head, token_batch
from .tensors import FixedTensor, MaskedTensor


class LossNotFinite(ArithmeticError):
    """The loss became NaN or infinite; the logits are those before the step that showed it."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


@dataclass(frozen=True)
class LearningProblem:
    """Everything a mask is learned from.

    Attributes:
        model: a transformers causal language model in float32; its weights beside those of
            ``tensors`` and ``fixed`` stay as they are.
        tensors: the weights that get a mask.
        fixed: weights that the merge changes without a mask.
        pairs: tokenised preference pairs, in the order of the first epoch.
        utility: tokenised harmless prompts with answers.
        settings: of the recipe.
        autocast: type in which the model computes; None for float32.
        micro_batch: pairs that go through the model at once.
    """

    model: Any
    tensors: Sequence[MaskedTensor]
    fixed: Sequence[FixedTensor]
    pairs: Sequence[EncodedPair]
    utility: Sequence[EncodedAnswer]
    settings: Settings
    autocast: torch.dtype | None
    micro_batch: int


class Passes:
    """The passes through the model, with what they are compared with."""

    def __init__(self, problem: LearningProblem):
        self.problem = problem
        self.settings = problem.settings
        self.head = output_head(problem.model)
        self.device = next(problem.model.parameters()).device
        # Log-probabilities of each pair's answers under the reference, and of each utility
        # answer's tokens under the unmasked merge.
        self.reference: dict[int, tuple[float, float]] = {}
        self.unmasked: dict[int, Tensor] = {}

    @torch.no_grad()
    def compare(
        self, rows: list[int], utility_rows: list[int], on_reference: Callable[[int, int], None]
    ) -> None:
        """Compute what stays the same for all steps; leave the fixed weights at the merge's."""
        problem, settings = self.problem, self.settings
        if settings.objective not in PREFERENCES or settings.reference == "redrawn":
            rows = []
        total = len(rows) + len(utility_rows)
        if utility_rows:
            for tensor in problem.tensors:
                tensor.write_unmasked()
            for other in problem.fixed:
                other.write_unmasked()
            for part in self._parts(utility_rows, self._utility_length):
                log_probs, owners = self._utility_log_probs(part)
                for place, row in enumerate(part):
                    self.unmasked[row] = log_probs[owners == place]
                on_reference(len(self.unmasked), total)
        if rows:
            for tensor in problem.tensors:
                tensor.write_base() if settings.reference == "base" else tensor.write_soft()
            for other in problem.fixed:
                other.write_base() if settings.reference == "base" else other.write_unmasked()
            for part in self._parts(rows, self._pair_length):
                self._keep_reference(part)
                on_reference(len(self.unmasked) + len(self.reference), total)
        for other in problem.fixed:
            other.write_unmasked()

    @torch.no_grad()
    def redraw(self, step: int, batch: list[int]) -> None:
        """Take the merge under a new draw of the untrained mask as this batch's reference."""
        for tensor in self.problem.tensors:
            tensor.write_untrained_sample(step)
        for part in self._parts(batch, self._pair_length):
            self._keep_reference(part)

    def pairs_backward(self, batch: list[int], step: int) -> tuple[float, list[float]]:
        """Add the gradient of the mean loss of a batch; return that loss and the margins."""
        total, margins = 0.0, []
        for part in self._parts(batch, self._pair_length):
            losses, found = self._pair_losses(part)
            self._check(losses, step)
            (losses.sum() / len(batch)).backward()
            total += float(losses.detach().sum())
            margins += found
        return total / len(batch), margins

    def utility_backward(self, batch: list[int], step: int) -> float:
        """Add the gradient of the weighted mean divergence of a batch's tokens; return the mean."""
        tokens = sum(len(self.problem.utility[row].answer) for row in batch)
        total = 0.0
        for part in self._parts(batch, self._utility_length):
            log_probs, _ = self._utility_log_probs(part)
            apart = divergences(log_probs, torch.cat([self.unmasked[row] for row in part]))
            self._check(apart, step)
            (apart.sum() * (self.settings.utility_weight / tokens)).backward()
            total += float(apart.detach().sum())
        return total / tokens

    def _pair_losses(self, rows: list[int]) -> tuple[Tensor, list[float]]:
        settings = self.settings
        if settings.objective not in PREFERENCES:
            pairs = [self.problem.pairs[row] for row in rows]
            return sft_losses(*self._sums([(p.prompt, p.chosen) for p in pairs])), []
        chosen, rejected, likelihoods = self._pair_log_probs(rows)
        fixed = torch.tensor([self.reference[row] for row in rows], device=self.device)
        log_ratio = (chosen - rejected) - (fixed[:, 0] - fixed[:, 1])
        losses, margins = preference_losses(settings.objective, log_ratio, settings.beta)
        if settings.sft_weight:
            losses = losses + settings.sft_weight * likelihoods
        return losses, margins.tolist()

    def _keep_reference(self, rows: list[int]) -> None:
        chosen, rejected, _ = self._pair_log_probs(rows)
        values = zip(chosen.tolist(), rejected.tolist(), strict=True)
        self.reference.update(zip(rows, values, strict=True))

    def _pair_log_probs(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the safe and the unsafe answers (per token for ``ipo``) and
        the sft loss of the safe ones, (rows,) each.
        """
        pairs = [self.problem.pairs[row] for row in rows]
        sums, tokens = self._sums(
            [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        )
        count = len(rows)
        likelihoods = sft_losses(sums[:count], tokens[:count])
        if self.settings.objective == "ipo":
            sums = sums / tokens
        return sums[:count], sums[count:], likelihoods

    def _sums(self, sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return answer_log_probs(
                self.problem.model, self.head, token_batch(sequences, self.device)
            )

    def _utility_log_probs(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        examples = [self.problem.utility[row] for row in rows]
        batch = token_batch([(e.prompt, e.answer) for e in examples], self.device)
        with self._autocast():
            return answer_token_log_probs(self.problem.model, self.head, batch)

    def _parts(self, rows: list[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Cut rows into micro-batches of like length, so that little of them is padding."""
        order = sorted(rows, key=length)
        for start in range(0, len(order), self.problem.micro_batch):
            yield order[start : start + self.problem.micro_batch]

    def _pair_length(self, row: int) -> int:
        pair = self.problem.pairs[row]
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    def _utility_length(self, row: int) -> int:
        example = self.problem.utility[row]
        return len(example.prompt) + len(example.answer)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.problem.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _check(self, losses: Tensor, step: int) -> None:
        if not torch.isfinite(losses).all():
            raise LossNotFinite(step)
