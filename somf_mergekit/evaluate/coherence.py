"""Whether answers are language at all: an answer of gibberish neither refuses nor helps."""

from collections.abc import Sequence
from typing import Any

from ..data.chat import AS_GIVEN, Message, encoded
from ..data.rendering import Rendering
from .likelihood import OnBatch, answer_scores, untold

N_GRAM = 4


def repeated_share(tokens: Sequence[int], n: int = N_GRAM) -> float:
    """Return the share of n-grams that stood before, 1 - different / all (arXiv 1908.04319).

    It is 0 where there is no n-gram.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answers_coherence(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str | None],
    *,
    max_length: int,
    batch_size: int,
    on_batch: OnBatch = untold,
    how: Rendering = AS_GIVEN,
) -> dict[str, list[float] | list[int]]:
    """Return how another model, the base, reads answers to ``prompts``.

    The answers are put into its own tokens, cut to ``max_length`` with the prompt, without an end
    marker: one that ran out of tokens has none either.

    Returns:
        ``log_probs`` of the answers under the model, in nats, their number of ``tokens`` and the
        share of ``repeated`` n-grams in them, one entry an answer.
    """
    sequences, repeated = [], []
    for messages, answer in zip(prompts, answers, strict=True):
        found = encoded(tokenizer, messages, [answer or ""], max_length, how, closed=False)
        sequences.append((found.prompt, found.answers[0]))
        repeated.append(repeated_share(found.answers[0]))
    scores = answer_scores(model, sequences, batch_size=batch_size, on_batch=on_batch)
    return {"log_probs": scores.log_probs, "tokens": scores.tokens, "repeated": repeated}
