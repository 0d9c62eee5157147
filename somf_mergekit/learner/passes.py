"""The losses of learning, step by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.logprobs import answer_sums, pair_log_probs
from .comparison import Comparison
from .divergence import LearningDiverged
from .engine import LossNotFinite, Part, gradient_squares
from .objectives import PREFERENCES, divergences, preference_losses, sft_losses
from .problem import LearningProblem


@dataclass
class Losses:
    """What the passes of a step showed.

    Attributes:
        loss: mean over the pairs of the objective.
        margins: of each pair; none where the objective has no margin.
        utility: mean divergence over the tokens of the utility examples; None without them.
        wrong_rows: rows of this process' pairs whose loss is not finite.
        wrong_utility: rows of its utility examples whose divergence is not finite.
    """

    loss: float
    margins: list[float]
    utility: float | None
    wrong_rows: list[int] = field(default_factory=list)
    wrong_utility: list[int] = field(default_factory=list)


class Passes:
    """The passes of learning."""

    def __init__(self, problem: LearningProblem, comparison: Comparison):
        """Take what is learned from, and what it is compared with."""
        self.problem = problem
        self.settings = problem.settings
        self.comparison = comparison

    def learn(self, batch: list[int], utility: list[int], step: int, rate_share: float) -> Losses:
        """Take a step by a batch's mean loss and its weighted utility term; return what it showed.

        Args:
            batch: rows of the pairs, of all processes.
            utility: rows of the utility examples, likewise; none for no utility term.
            step: its number.
            rate_share: of the learning rate at its peak, from 0 to 1.

        Raises:
            LearningDiverged: the loss is not finite, and no logit has changed; or a gradient is
                not, and some have.
        """
        together = self.problem.together
        shown = Losses(0.0, [], 0.0 if utility else None)
        is_safe_alone = self.settings.objective not in PREFERENCES
        parts = [
            Part(
                self.problem.pair_batch(rows, is_safe_alone),
                self._pair_loss(rows, 1 / len(batch), step, shown),
            )
            for rows in self.problem.pair_parts(together.share(batch))
        ]
        tokens = sum(len(self.problem.utility[row].chosen) for row in utility)
        parts += [
            Part(
                self.problem.utility_batch(rows),
                self._utility_loss(rows, 1 / tokens, step, shown),
            )
            for rows in self.problem.utility_parts(together.share(utility))
        ]
        try:
            self.problem.engine.learn(parts, step, rate_share)
        except LossNotFinite as error:
            raise LearningDiverged(
                step,
                rows=sorted(together.gathered(shown.wrong_rows)),
                utility_rows=sorted(together.gathered(shown.wrong_utility)),
            ) from error
        wrong = self._wrong_gradients()
        if wrong:
            raise LearningDiverged(step, tensors=wrong)
        return Losses(
            sum(together.gathered([shown.loss])),
            together.gathered(shown.margins),
            None if shown.utility is None else sum(together.gathered([shown.utility])),
        )

    def _wrong_gradients(self) -> list[str]:
        """Return the tensors whose logits' gradient in the latest update is not finite."""
        problem = self.problem
        squares = gradient_squares(problem.tensors, problem.together, problem.engine.device)
        pairs = zip(problem.tensors, squares.tolist(), strict=True)
        return [tensor.name for tensor, square in pairs if not math.isfinite(square)]

    def _pair_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            losses, margins = self._pair_losses(rows, log_probs, owners)
            finite = torch.isfinite(losses).tolist()
            shown.wrong_rows += [
                self.problem.pairs[row].row
                for row, good in zip(rows, finite, strict=True)
                if not good
            ]
            total = _finite_sum(losses, step) * share
            shown.loss += float(total.detach())
            shown.margins += margins
            return total

        return loss

    def _utility_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            apart = divergences(
                log_probs, torch.cat([self.comparison.unmasked[row] for row in rows])
            )
            wrong = owners[~torch.isfinite(apart)].unique().tolist()
            shown.wrong_utility += [self.problem.utility[rows[place]].row for place in wrong]
            total = _finite_sum(apart, step) * share
            shown.utility = (shown.utility or 0.0) + float(total.detach())
            return total * self.settings.utility_weight

        return loss

    def _pair_losses(
        self, rows: list[int], log_probs: Tensor, owners: Tensor
    ) -> tuple[Tensor, list[float]]:
        settings = self.settings
        if settings.objective not in PREFERENCES:
            return sft_losses(*answer_sums(log_probs, owners, len(rows))), []
        found = pair_log_probs(log_probs, owners, len(rows))
        log_ratio = self.comparison.log_ratios(rows, found)
        losses, margins = preference_losses(settings.objective, log_ratio, settings.beta)
        if settings.sft_weight:
            likelihoods = sft_losses(found.chosen, found.chosen_tokens)
            losses = losses + settings.sft_weight * likelihoods
        return losses, margins.tolist()


def _finite_sum(losses: Tensor, step: int) -> Tensor:
    if not torch.isfinite(losses).all():
        raise LossNotFinite(step)
    return losses.sum()
