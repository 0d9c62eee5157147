"""What a mask is learned from, and how: handed to all that takes part in learning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..common.process_group import ALONE, Processes
from ..data.encoding import EncodedPair
from ..data.logprobs import TokenBatch, pair_batch, pair_length, pair_log_probs
from ..recipe.settings import Settings
from .engine import Engine, TokenLogProbs
from .parts import Content, State
from .tensors import MaskedTensor


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a mask is learned from.

    Attributes:
        engine: runs the model.
        tensors: the weights that get a mask.
        pairs: tokenised preference pairs, in the order of the first epoch.
        utility: tokenised harmless prompts with answers.
        settings: of the recipe.
        micro_batch: pairs that go through the model at once.
        process_group: this process among those that learn; all have the same of the above.
        held_out: tokenised pairs that are not learned from, to report on.
        validation: likewise, to choose the mask by; none where it is that of the last step.
    """

    engine: Engine
    tensors: Sequence[MaskedTensor]
    pairs: Sequence[EncodedPair]
    utility: Sequence[EncodedPair]
    settings: Settings
    micro_batch: int
    process_group: Processes = ALONE
    held_out: Sequence[EncodedPair] = ()
    validation: Sequence[EncodedPair] = ()

    def evaluated(
        self, batches: Iterator[TokenBatch], count: int, state: State
    ) -> Iterable[TokenLogProbs]:
        """Return what the engine makes of this process' batches, of which there are ``count``."""
        # An engine may need all processes where one has something to evaluate.
        if not any(self.process_group.gathered([count])):
            return ()
        return self.engine.evaluate(batches, state)

    def pair_parts(self, rows: Iterable[int]) -> list[list[int]]:
        """Cut rows of the pairs into micro-batches, see ``parts``."""
        return self.parts(rows, lambda row: pair_length(self.pairs[row]))

    def utility_parts(self, rows: Iterable[int]) -> list[list[int]]:
        """Cut rows of the utility examples into micro-batches, see ``parts``."""
        return self.parts(rows, lambda row: pair_length(self.utility[row]))

    def pair_batch(self, rows: Sequence[int], is_safe_alone: bool = False) -> TokenBatch:
        """Return rows of the pairs as ``logprobs.pair_batch`` does."""
        return pair_batch([self.pairs[row] for row in rows], self.engine.device, is_safe_alone)

    def utility_batch(self, rows: Sequence[int]) -> TokenBatch:
        """Return rows of the utility examples as a batch."""
        return pair_batch(
            [self.utility[row] for row in rows], self.engine.device, is_safe_alone=True
        )

    def parts(self, rows: Iterable[int], length: Callable[[int], int]) -> list[list[int]]:
        """Cut rows into micro-batches of like length, so that little of them is padding."""
        order, size = sorted(rows, key=length), self.micro_batch
        return [order[start : start + size] for start in range(0, len(order), size)]


def pair_margins(
    setup: TrainingSetup,
    pairs: Sequence[EncodedPair],
    content: Content,
    on_pairs: Callable[[int], object] = lambda count: None,
) -> list[float]:
    """Return by how many nats a token the safe answer of each pair is the likelier one.

    The measure of ``evaluate.likelihood.preference_margins``. Each process takes its share of the
    pairs, and gets the margins of all.

    Args:
        setup: what is learned from.
        pairs: that are not learned from.
        content: what the weights are.
        on_pairs: called with the number of pairs after each micro-batch.
    """
    process_group = setup.process_group
    own_rows = process_group.share(list(range(len(pairs))))
    parts = setup.parts(own_rows, lambda row: pair_length(pairs[row]))
    batches = (pair_batch([pairs[row] for row in part], setup.engine.device) for part in parts)
    own: list[tuple[int, float]] = []
    found = setup.evaluated(batches, len(parts), State(content))
    for part, result in zip(parts, found, strict=True):
        margins = pair_log_probs(*result, len(part)).counted(per_token=True).ratios
        own += zip(part, margins.tolist(), strict=True)
        on_pairs(len(part))
    return [margin for _, margin in sorted(process_group.gathered(own))]
