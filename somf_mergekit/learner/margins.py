"""What the merge makes of the pairs that were held out from learning."""

from collections.abc import Callable

from ..data.logprobs import pair_batch, pair_length, pair_log_probs
from .problem import LearningProblem
from .tensors import Content, State


def held_out_margins(
    problem: LearningProblem, content: Content, on_pairs: Callable[[int], object]
) -> list[float]:
    """Return by how many nats a token the safe answer of each held-out pair is the likelier one.

    The measure of ``evaluate.likelihood.preference_margins``. Each process takes its share of the
    pairs, and gets the margins of all.

    Args:
        problem: what was learned from.
        content: what the weights are.
        on_pairs: called with the number of pairs after each micro-batch.
    """
    pairs, together = problem.held_out, problem.together

    def length(row: int) -> int:
        return pair_length(pairs[row])

    parts = list(problem.parts(together.share(list(range(len(pairs)))), length))
    batches = (pair_batch([pairs[row] for row in part], problem.engine.device) for part in parts)
    own: list[tuple[int, float]] = []
    found = problem.evaluated(batches, len(parts), State(content))
    for part, result in zip(parts, found, strict=True):
        margins = pair_log_probs(*result, len(part)).counted(per_token=True).ratios
        own += zip(part, margins.tolist(), strict=True)
        on_pairs(len(part))
    return [margin for _, margin in sorted(together.gathered(own))]
