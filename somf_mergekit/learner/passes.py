"""The passes of learning: what the merge is compared with, and the losses of each step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..data.logprobs import answer_sums, pair_log_probs
from .checkpoint_file import Progress
from .engine import Part, gradient_squares
from .objectives import PER_TOKEN, PREFERENCES, divergences, preference_losses, sft_losses
from .parts import Content, State
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
    """The passes of learning.

    Log-probabilities to compare with are computed once, and stored with the progress; but for a
    reference that is drawn anew each step.
    """

    def __init__(self, setup: TrainingSetup, progress: Progress):
        """Take what is learned from, and what was computed before."""
        self.setup, self.settings = setup, setup.settings
        self._reference, self._unmasked = progress.reference, progress.unmasked
        self._is_preference = setup.settings.objective in PREFERENCES
        self._is_redrawn = self._is_preference and setup.settings.reference == "redrawn"

    def compare(
        self, rows: list[int], utility_rows: list[int], on_reference: Callable[[int, int], None]
    ) -> None:
        """Compute what stays the same for all steps, where it is not known.

        Args:
            rows: of the pairs.
            utility_rows: of the utility examples.
            on_reference: called with how many examples are done, and of how many.
        """
        rows = [row for row in rows if row not in self._reference]
        if not self._is_preference or self._is_redrawn:
            rows = []
        utility_rows = [row for row in utility_rows if row not in self._unmasked]
        done, total = 0, len(rows) + len(utility_rows)
        content = Content.BASE if self.settings.reference == "base" else Content.SOFT
        unmasked = self._add_unmasked(utility_rows)
        for count in chain(unmasked, self._add_reference(rows, State(content))):
            done += count
            on_reference(done, total)

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
        own = process_group.share(batch)
        if self._is_redrawn:
            for _ in self._add_reference(own, State(Content.UNTRAINED_SAMPLE, step)):
                pass
        shown = Losses(0.0, [], 0.0 if utility else None)
        parts = [
            Part(
                setup.pair_batch(rows, is_safe_alone=not self._is_preference),
                self._pair_loss(rows, 1 / len(batch), step, shown),
            )
            for rows in setup.pair_parts(own)
        ]
        tokens = sum(len(setup.utility[row].chosen) for row in utility)
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

    def _add_unmasked(self, rows: list[int]) -> Iterator[int]:
        """Compute the unmasked merge's log-probabilities; yield each micro-batch's examples."""
        setup = self.setup
        parts = setup.utility_parts(rows)
        batches = map(setup.utility_batch, parts)
        found = setup.evaluated(batches, len(parts), State(Content.UNMASKED))
        for part, (log_probs, owners) in zip(parts, found, strict=True):
            for place, row in enumerate(part):
                self._unmasked[row] = log_probs[owners == place]
            yield len(part)

    def _add_reference(self, rows: list[int], state: State) -> Iterator[int]:
        """Compute the reference's log-probabilities; yield each micro-batch's pairs."""
        setup = self.setup
        parts = setup.pair_parts(rows)
        found = setup.evaluated(map(setup.pair_batch, parts), len(parts), state)
        for part, result in zip(parts, found, strict=True):
            counted = pair_log_probs(*result, len(part)).counted(
                self.settings.objective in PER_TOKEN
            )
            values = zip(counted.chosen.tolist(), counted.rejected.tolist(), strict=True)
            self._reference.update(zip(part, values, strict=True))
            yield len(part)

    def _pair_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            losses, margins = self._pair_losses(rows, log_probs, owners)
            wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            if wrong:
                wrong_rows = [self.setup.pairs[rows[place]].row for place in wrong]
                raise LearningDiverged(step, rows=wrong_rows)
            total = losses.sum() * share
            shown.loss += float(total.detach())
            shown.margins += margins
            return total

        return loss

    def _utility_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            apart = divergences(log_probs, torch.cat([self._unmasked[row] for row in rows]))
            wrong = owners[~torch.isfinite(apart)].unique().tolist()
            if wrong:
                wrong_rows = [self.setup.utility[rows[place]].row for place in wrong]
                raise LearningDiverged(step, utility_rows=wrong_rows)
            total = apart.sum() * share
            shown.utility = (shown.utility or 0.0) + float(total.detach())
            return total * self.settings.utility_weight

        return loss

    def _pair_losses(
        self, rows: list[int], log_probs: Tensor, owners: Tensor
    ) -> tuple[Tensor, list[float]]:
        settings = self.settings
        if not self._is_preference:
            return sft_losses(*answer_sums(log_probs, owners, len(rows))), []
        found = pair_log_probs(log_probs, owners, len(rows))
        fixed = torch.tensor([self._reference[row] for row in rows], device=log_probs.device)
        log_ratio = found.counted(settings.objective in PER_TOKEN).ratios - (
            fixed[:, 0] - fixed[:, 1]
        )
        losses, margins = preference_losses(settings.objective, log_ratio, settings.beta)
        if settings.sft_weight:
            likelihoods = sft_losses(found.chosen, found.chosen_tokens)
            losses = losses + settings.sft_weight * likelihoods
        return losses, margins.tolist()
