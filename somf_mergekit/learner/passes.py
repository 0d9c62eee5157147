"""The losses of learning, step by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.logprobs import answer_sums
from ..data.sequences import pair_log_probs
from .comparison import Comparison
from .engine import Part, gradient_squares
from .objectives import PREFERENCES, divergences, preference_losses, sft_losses
from .stopping import LearningDiverged
from .training_setup import TrainingSetup


@dataclass
class Losses:
    """What the passes of a step showed.

    Attributes:
        loss: mean over the pairs of the objective.
        margins: of each pair; none where the objective has no margin.
        utility: mean divergence over the tokens of the utility examples; None without them.
    """

    loss: float
    margins: list[float]
    utility: float | None


class Passes:
    """The passes of learning."""

    def __init__(self, setup: TrainingSetup, comparison: Comparison):
        """Take what is learned from, and what it is compared with."""
        self.setup = setup
        self.settings = setup.settings
        self.comparison = comparison

    def learn(self, batch: list[int], utility: list[int], step: int, multiplier: float) -> Losses:
        """Take a step by a batch's mean loss and its weighted utility term; return what it showed.

        Args:
            batch: rows of the pairs, of all processes.
            utility: rows of the utility examples, likewise; none for no utility term.
            step: its number.
            multiplier: of the learning rate, from 0 to 1.

        Raises:
            LearningDiverged: the loss is not finite, and no logit has changed; or a gradient is
                not, and some have.
        """
        setup, process_group = self.setup, self.setup.process_group
        shown = Losses(0.0, [], 0.0 if utility else None)
        is_safe_alone = self.settings.objective not in PREFERENCES
        parts = [
            Part(
                setup.pair_batch(rows, is_safe_alone),
                self._pair_loss(rows, 1 / len(batch), step, shown),
            )
            for rows in setup.pair_parts(process_group.share(batch))
        ]
        tokens = sum(len(setup.utility[row].answer) for row in utility)
        parts += [
            Part(setup.utility_batch(rows), self._utility_loss(rows, 1 / tokens, step, shown))
            for rows in setup.utility_parts(process_group.share(utility))
        ]
        setup.engine.learn(parts, step, multiplier)
        squares = gradient_squares(setup.tensors, process_group, setup.engine.device)
        pairs = zip(setup.tensors, squares.tolist(), strict=True)
        wrong = [tensor.name for tensor, square in pairs if not math.isfinite(square)]
        if wrong:
            raise LearningDiverged(step, tensors=wrong)
        return Losses(
            sum(process_group.gathered([shown.loss])),
            process_group.gathered(shown.margins),
            None if shown.utility is None else sum(process_group.gathered([shown.utility])),
        )

    def _pair_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            losses, margins = self._pair_losses(rows, log_probs, owners)
            wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            if wrong:
                raise LearningDiverged(
                    step, rows=[self.setup.pairs[rows[place]].row for place in wrong]
                )
            total = losses.sum() * share
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
            if wrong:
                raise LearningDiverged(
                    step, utility_rows=[self.setup.utility[rows[place]].row for place in wrong]
                )
            total = apart.sum() * share
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
