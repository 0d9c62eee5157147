"""What the passes of learning are compared with, and what held-out pairs say of the result."""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from ..data.sequences import PairLogProbs, pair_batch, pair_length, pair_log_probs
from .objectives import PREFERENCES
from .tensors import Content, State
from .training_setup import TrainingSetup


class Comparison:
    """Log-probabilities under the reference and under the unmasked merge.

    They stay the same, but for a reference that is drawn anew each step.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        reference: dict[int, tuple[float, float]] | None = None,
        unmasked: dict[int, Tensor] | None = None,
    ):
        """Take a set-up, and what is known already.

        Args:
            setup: what is learned from.
            reference: log-probabilities of each pair's answers under the reference, by its row.
            unmasked: of each utility answer's tokens under the unmasked merge, likewise.
        """
        self.setup = setup
        self.reference = {} if reference is None else reference
        self.unmasked = {} if unmasked is None else unmasked

    def compute(
        self, rows: list[int], utility_rows: list[int], on_reference: Callable[[int, int], None]
    ) -> None:
        """Compute what stays the same for all steps, where it is not known.

        Args:
            rows: of the pairs.
            utility_rows: of the utility examples.
            on_reference: called with how many examples are done, and of how many.
        """
        settings = self.setup.settings
        if settings.objective not in PREFERENCES or settings.reference == "redrawn":
            rows = []
        rows = [row for row in rows if row not in self.reference]
        utility_rows = [row for row in utility_rows if row not in self.unmasked]
        done, total = 0, len(rows) + len(utility_rows)
        content = Content.BASE if settings.reference == "base" else Content.SOFT
        unmasked = self._add_unmasked(utility_rows)
        for count in chain(unmasked, self._add_reference(rows, State(content))):
            done += count
            on_reference(done, total)

    def redraw(self, step: int, batch: list[int]) -> None:
        """Take the merge under a new draw of the untrained mask as this batch's reference."""
        own = self.setup.process_group.share(batch)
        for _ in self._add_reference(own, State(Content.UNTRAINED_SAMPLE, step)):
            pass

    def log_ratios(self, rows: list[int], found: PairLogProbs) -> Tensor:
        """Return h of ``objectives.preference_losses``, (pairs,).

        Args:
            rows: of the pairs.
            found: what the merge makes of them.
        """
        fixed = torch.tensor([self.reference[row] for row in rows], device=found.chosen.device)
        ratios = found.counted(self.setup.settings.objective).ratios
        return ratios - (fixed[:, 0] - fixed[:, 1])

    def _add_unmasked(self, rows: list[int]) -> Iterator[int]:
        """Compute the unmasked merge's; yield how many after each micro-batch."""
        setup = self.setup
        parts = setup.utility_parts(rows)
        batches = map(setup.utility_batch, parts)
        found = setup.evaluated(batches, len(parts), State(Content.UNMASKED))
        for part, (log_probs, owners) in zip(parts, found, strict=True):
            for place, row in enumerate(part):
                self.unmasked[row] = log_probs[owners == place]
            yield len(part)

    def _add_reference(self, rows: list[int], state: State) -> Iterator[int]:
        """Compute the reference's; yield how many after each micro-batch."""
        setup = self.setup
        parts = setup.pair_parts(rows)
        found = setup.evaluated(map(setup.pair_batch, parts), len(parts), state)
        for part, result in zip(parts, found, strict=True):
            counted = pair_log_probs(*result, len(part)).counted(setup.settings.objective)
            values = zip(counted.chosen.tolist(), counted.rejected.tolist(), strict=True)
            self.reference.update(zip(part, values, strict=True))
            yield len(part)


def held_out_margins(
    setup: TrainingSetup, content: Content, on_pairs: Callable[[int], object]
) -> list[float]:
    """Return by how many nats a token the safe answer of each held-out pair is the likelier one.

    The measure of ``evaluate.likelihood.preference_margins``. Each process takes its share of the
    pairs, and gets the margins of all.

    Args:
        setup: what was learned from.
        content: what the weights are.
        on_pairs: called with the number of pairs after each micro-batch.
    """
    pairs, process_group = setup.held_out, setup.process_group
    own_rows = process_group.share(list(range(len(pairs))))
    parts = setup.parts(own_rows, lambda row: pair_length(pairs[row]))
    batches = (pair_batch([pairs[row] for row in part], setup.engine.device) for part in parts)
    own: list[tuple[int, float]] = []
    found = setup.evaluated(batches, len(parts), State(content))
    for part, result in zip(parts, found, strict=True):
        margins = pair_log_probs(*result, len(part)).per_token().ratios
        own += zip(part, margins.tolist(), strict=True)
        on_pairs(len(part))
    return [margin for _, margin in sorted(process_group.gathered(own))]
