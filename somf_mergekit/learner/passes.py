"""The losses of learning, and what they are compared with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..answers import EncodedAnswer
from ..objectives import PREFERENCES, divergences, preference_losses, sft_losses
from ..preferences import EncodedPair
from ..processes import ALONE, Processes
from ..recipe import Settings
from .engine import Engine, LossNotFinite, Part, TokenLogProbs
from .logprobs import TokenBatch, answer_sums, token_batch
from .tensors import Content, MaskedTensor, State


@dataclass(frozen=True)
class LearningProblem:
    """Everything a mask is learned from.

    Attributes:
        engine: runs the model.
        tensors: the weights that get a mask.
        pairs: tokenised preference pairs, in the order of the first epoch.
        utility: tokenised harmless prompts with answers.
        settings: of the recipe.
        micro_batch: pairs that go through the model at once.
        together: this process among those that learn; all have the same of the above.
        held_out: tokenised pairs that are not learned from.
    """

    engine: Engine
    tensors: Sequence[MaskedTensor]
    pairs: Sequence[EncodedPair]
    utility: Sequence[EncodedAnswer]
    settings: Settings
    micro_batch: int
    together: Processes = ALONE
    held_out: Sequence[EncodedPair] = ()

    def evaluated(
        self, batches: Iterator[TokenBatch], count: int, state: State
    ) -> Iterable[TokenLogProbs]:
        """Return what the engine makes of this process' batches, of which there are ``count``."""
        # An engine may need all processes where one has something to evaluate.
        if not any(self.together.gathered([count])):
            return ()
        return self.engine.evaluate(batches, state)

    def parts(self, rows: Iterable[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Cut rows into micro-batches of like length, so that little of them is padding."""
        order = sorted(rows, key=length)
        for start in range(0, len(order), self.micro_batch):
            yield order[start : start + self.micro_batch]


def pair_length(pair: EncodedPair) -> int:
    """Return the tokens of a pair's longer sequence."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


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
            LossNotFinite: no logit has changed.
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
        self.problem.engine.learn(parts, step, rate_share)
        return Losses(
            sum(together.gathered([shown.loss])),
            together.gathered(shown.margins),
            None if shown.utility is None else sum(together.gathered([shown.utility])),
        )

    def _pair_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, owners: Tensor) -> Tensor:
            losses, margins = self._pair_losses(rows, log_probs, owners)
            total = _finite_sum(losses, step) * share
            shown.loss += float(total.detach())
            shown.margins += margins
            return total

        return loss

    def _utility_loss(
        self, rows: list[int], share: float, step: int, shown: Losses
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(log_probs: Tensor, _: Tensor) -> Tensor:
            apart = divergences(log_probs, torch.cat([self.unmasked[row] for row in rows]))
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
        """Return log-probabilities of the safe and the unsafe answers (per token for ``ipo``) and
        the sft loss of the safe ones, (rows,) each.
        """
        count = len(rows)
        sums, tokens = answer_sums(log_probs, owners, 2 * count)
        likelihoods = sft_losses(sums[:count], tokens[:count])
        if self.settings.objective == "ipo":
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
