"""Measures that need no generation: loss on answers, preference between answers."""

from collections.abc import Sequence
from typing import Any

import torch

from ..dialogue import Message, encoded
from ..learner.logprobs import answer_log_probs, output_head, token_batch
from ..preferences import EncodedPair


def answer_loss(
    model: Any,
    tokenizer: Any,
    examples: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int,
) -> float:
    """Return the mean negative log-likelihood per answer token, in nats."""
    sequences = []
    for messages, answer in examples:
        prompt, (reply,) = encoded(tokenizer, messages, [answer], max_length)
        sequences.append((prompt, reply))
    sums, lengths = _log_probs(model, sequences, batch_size)
    return -sum(sums) / sum(lengths)


def preference_accuracy(
    model: Any, pairs: Sequence[EncodedPair], *, batch_size: int
) -> tuple[float, float]:
    """Return how often the safe answer is likelier per token, and by how many nats on average."""
    sequences = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    sums, lengths = _log_probs(model, sequences, batch_size)
    means = [total / length for total, length in zip(sums, lengths, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(means[::2], means[1::2], strict=True)]
    return (
        sum(margin > 0 for margin in margins) / len(margins),
        sum(margins) / len(margins),
    )


def _log_probs(
    model: Any, sequences: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple[list[float], list[int]]:
    head = output_head(model)
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    sums, lengths = [0.0] * len(sequences), [0] * len(sequences)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with torch.no_grad():
            batch = token_batch([sequences[row] for row in rows], model.device)
            totals, counts = answer_log_probs(model, head, batch)
        for row, total, count in zip(rows, totals.tolist(), counts.tolist(), strict=True):
            sums[row], lengths[row] = total, int(count)
    return sums, lengths
