"""The losses of learning, and what they are compared with."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..objectives import PER_TOKEN, PREFERENCES, divergences, preference_losses, sft_losses
from .divergence import Evidence, LearningDiverged
from .engine import LossNotFinite, Part
from .logprobs import TokenBatch, answer_sums, token_batch
from .problem import LearningProblem, pair_length
from .tensors import Content, State


@dataclass
class Losses:
    """What the passes of a step showed.

    Attributes:
        loss: mean over the pairs of the objective.
        margins: of each pair; none where the objective has no margin.
        utility: mean divergence over the tokens of the utility examples; None without them.
        of_pairs: losses of this process' pairs, each with its row in the data.
        wrong_utility: rows of this process' utility examples whose divergence is not finite.
    """

    loss: float
    margins: list[float]
    utility: float | None
    of_pairs: list[tuple[int, float]] = field(default_factory=list)
    wrong_utility: list[int] = field(default_factory=list)


class Passes:
    """The passes of learning, with what they are compared with."""

    def __init__(
        self,
        problem: LearningProblem,
        reference: dict[int, tuple[float, float]] | None = None,
        unmasked: dict[int, Tensor] | None = None,
    ):
        """Take a problem, and what is known already.

        Args:
            problem: what is learned from.
            reference: log-probabilities of each pair's answers under the reference, by its row.
            unmasked: of each utility answer's tokens under the unmasked merge, likewise.
        """
        self.problem = problem
        self.settings = problem.settings
        self.reference = {} if reference is None else reference
        self.unmasked = {} if unmasked is None else unmasked
        # Squared norms of the logits' gradients in the latest update, and its step.
        self._names = [tensor.name for tensor in problem.tensors]
        self._squares: list[float] = []
        self._updated = 0

    def compare(
        self, rows: list[int], utility_rows: list[int], on_reference: Callable[[int, int], None]
    ) -> None:
        """Compute what stays the same for all steps, where it is not known."""
        settings = self.settings
        if settings.objective not in PREFERENCES or settings.reference == "redrawn":
            rows = []
        rows = [row for row in rows if row not in self.reference]
        utility_rows = [row for row in utility_rows if row not in self.unmasked]
        done = len(self.unmasked) + len(self.reference)
        total = len(rows) + len(utility_rows)
        for _ in self._keep_unmasked(utility_rows):
            on_reference(len(self.unmasked) + len(self.reference) - done, total)
        content = Content.BASE if settings.reference == "base" else Content.SOFT
        for _ in self._keep_reference(rows, State(content)):
            on_reference(len(self.unmasked) + len(self.reference) - done, total)

    def redraw(self, step: int, batch: list[int]) -> None:
        """Take the merge under a new draw of the untrained mask as this batch's reference."""
        own = self.problem.together.share(batch)
        for _ in self._keep_reference(own, State(Content.UNTRAINED_SAMPLE, step)):
            pass

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
        parts = [
            Part(self._pair_batch(rows), self._pair_loss(rows, 1 / len(batch), step, shown))
            for rows in self.problem.parts(together.share(batch), self._pair_length)
        ]
        tokens = sum(len(self.problem.utility[row].answer) for row in utility)
        parts += [
            Part(self._utility_batch(rows), self._utility_loss(rows, 1 / tokens, step, shown))
            for rows in self.problem.parts(together.share(utility), self._utility_length)
        ]
        try:
            self.problem.engine.learn(parts, step, rate_share)
        except LossNotFinite as error:
            raise LearningDiverged(
                step, "the loss became NaN or infinite", self.evidence(shown), is_intact=True
            ) from error
        self._squares, self._updated = self._gradient_squares(), step
        if not all(map(math.isfinite, self._squares)):
            raise LearningDiverged(
                step, "a gradient became NaN or infinite", self.evidence(shown), is_intact=False
            )
        return Losses(
            sum(together.gathered([shown.loss])),
            together.gathered(shown.margins),
            None if shown.utility is None else sum(together.gathered([shown.utility])),
            shown.of_pairs,
        )

    def evidence(self, shown: Losses) -> Evidence:
        """Return what all processes know of a step, where it went bad."""
        together = self.problem.together
        pairs = together.gathered(shown.of_pairs)
        return Evidence.of(
            dict(zip(self._names, self._squares, strict=False)),
            self._updated,
            pairs,
            together.gathered(shown.wrong_utility),
        )

    def _gradient_squares(self) -> list[float]:
        """Return the squared norm of the gradient of each tensor's logits in the latest update."""
        together, tensors = self.problem.together, self.problem.tensors
        none = torch.zeros((), device=self.problem.engine.device)
        own = [none if t.gradient_square is None else t.gradient_square for t in tensors]
        # Those that every process has are added up as often as there are processes.
        counts = [together.count if t.is_shared else 1 for t in tensors]
        summands = torch.stack(own) / torch.tensor(counts, device=none.device)
        found: list[float] = together.add_up(summands).tolist()
        return found

    def _pair_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            losses, margins = self._pair_losses(rows, log_probs, owners)
            numbers = (self.problem.pairs[row].row for row in rows)
            shown.of_pairs += zip(numbers, losses.tolist(), strict=True)
            total = _finite_sum(losses, step) * share
            shown.loss += float(total.detach())
            shown.margins += margins
            return total

        return loss

    def _utility_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            apart = divergences(log_probs, torch.cat([self.unmasked[row] for row in rows]))
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
        chosen, rejected, likelihoods = self._pair_log_probs(rows, log_probs, owners)
        fixed = torch.tensor([self.reference[row] for row in rows], device=log_probs.device)
        log_ratio = (chosen - rejected) - (fixed[:, 0] - fixed[:, 1])
        losses, margins = preference_losses(settings.objective, log_ratio, settings.beta)
        if settings.sft_weight:
            losses = losses + settings.sft_weight * likelihoods
        return losses, margins.tolist()

    def _keep_unmasked(self, rows: list[int]) -> Iterator[None]:
        parts = list(self.problem.parts(rows, self._utility_length))
        found = self.problem.evaluated(
            map(self._utility_batch, parts), len(parts), State(Content.UNMASKED)
        )
        for part, (log_probs, owners) in zip(parts, found, strict=True):
            for place, row in enumerate(part):
                self.unmasked[row] = log_probs[owners == place]
            yield

    def _keep_reference(self, rows: list[int], state: State) -> Iterator[None]:
        parts = list(self.problem.parts(rows, self._pair_length))
        found = self.problem.evaluated(map(self._pair_batch, parts), len(parts), state)
        for part, result in zip(parts, found, strict=True):
            chosen, rejected, _ = self._pair_log_probs(part, *result)
            values = zip(chosen.tolist(), rejected.tolist(), strict=True)
            self.reference.update(zip(part, values, strict=True))
            yield

    def _pair_batch(self, rows: list[int]) -> TokenBatch:
        """Return the safe answers of pairs, then the unsafe ones where the objective takes both."""
        pairs = [self.problem.pairs[row] for row in rows]
        sequences = [(pair.prompt, pair.chosen) for pair in pairs]
        if self.settings.objective in PREFERENCES:
            sequences += [(pair.prompt, pair.rejected) for pair in pairs]
        return token_batch(sequences, self.problem.engine.device)

    def _utility_batch(self, rows: list[int]) -> TokenBatch:
        examples = [self.problem.utility[row] for row in rows]
        sequences = [(example.prompt, example.answer) for example in examples]
        return token_batch(sequences, self.problem.engine.device)

    def _pair_log_probs(
        self, rows: list[int], log_probs: Tensor, owners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the safe and the unsafe answers (per token for PER_TOKEN) and
        the sft loss of the safe ones, (rows,) each.
        """
        count = len(rows)
        sums, tokens = answer_sums(log_probs, owners, 2 * count)
        likelihoods = sft_losses(sums[:count], tokens[:count])
        if self.settings.objective in PER_TOKEN:
            sums = sums / tokens
        return sums[:count], sums[count:], likelihoods

    def _pair_length(self, row: int) -> int:
        return pair_length(self.problem.pairs[row])

    def _utility_length(self, row: int) -> int:
        example = self.problem.utility[row]
        return len(example.prompt) + len(example.answer)


def _finite_sum(losses: Tensor, step: int) -> Tensor:
    if not torch.isfinite(losses).all():
        raise LossNotFinite(step)
    return losses.sum()
