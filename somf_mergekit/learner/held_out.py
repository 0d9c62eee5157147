"""What the merge makes of the pairs that were held out from learning."""

from collections.abc import Callable

from .logprobs import answer_sums, token_batch
from .problem import LearningProblem, pair_length
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
    batches = (
        token_batch(
            [(pairs[row].prompt, pairs[row].chosen) for row in part]
            + [(pairs[row].prompt, pairs[row].rejected) for row in part],
            problem.engine.device,
        )
        for part in parts
    )
    own: list[tuple[int, float]] = []
    found = problem.evaluated(batches, len(parts), State(content))
    for part, (log_probs, owners) in zip(parts, found, strict=True):
        sums, tokens = answer_sums(log_probs, owners, 2 * len(part))
        means = sums / tokens
        margins = means[: len(part)] - means[len(part) :]
        own += zip(part, margins.tolist(), strict=True)
        on_pairs(len(part))
    return [margin for _, margin in sorted(together.gathered(own))]
