"""What the passes of learning are compared with: it stays the same, or is drawn anew each step."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..data.logprobs import PairLogProbs, pair_log_probs
from .objectives import PER_TOKEN, PREFERENCES
from .problem import LearningProblem
from .tensors import Content, State


class Comparison:
    """Log-probabilities under the reference and under the unmasked merge."""

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
        settings = self.problem.settings
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

    def log_ratios(self, rows: list[int], found: PairLogProbs) -> Tensor:
        """Return h of ``objectives.preference_losses``, (pairs,).

        Args:
            rows: of the pairs.
            found: what the merge makes of them.
        """
        fixed = torch.tensor([self.reference[row] for row in rows], device=found.chosen.device)
        ratios = found.counted(self.problem.settings.objective in PER_TOKEN).ratios
        return ratios - (fixed[:, 0] - fixed[:, 1])

    def _keep_unmasked(self, rows: list[int]) -> Iterator[None]:
        problem = self.problem
        parts = list(problem.utility_parts(rows))
        batches = map(problem.utility_batch, parts)
        found = problem.evaluated(batches, len(parts), State(Content.UNMASKED))
        for part, (log_probs, owners) in zip(parts, found, strict=True):
            for place, row in enumerate(part):
                self.unmasked[row] = log_probs[owners == place]
            yield

    def _keep_reference(self, rows: list[int], state: State) -> Iterator[None]:
        problem = self.problem
        per_token = problem.settings.objective in PER_TOKEN
        parts = list(problem.pair_parts(rows))
        found = problem.evaluated(map(problem.pair_batch, parts), len(parts), state)
        for part, result in zip(parts, found, strict=True):
            counted = pair_log_probs(*result, len(part)).counted(per_token)
            values = zip(counted.chosen.tolist(), counted.rejected.tolist(), strict=True)
            self.reference.update(zip(part, values, strict=True))
            yield
