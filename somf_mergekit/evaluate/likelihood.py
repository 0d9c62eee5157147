"""Measures that need no generation: likelihood of answers, preference between answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.chat import AS_GIVEN, Message, encoded
from ..data.logprobs import CHUNK_POSITIONS, answer_states, output_head, token_batch
from ..data.pairs import EncodedPair, Pair
from ..data.rendering import Rendering

Sequences = Sequence[tuple[list[int], list[int]]]
OnBatch = Callable[[int], object]


def untold(count: int) -> None:
    """Tell no one of ``count`` sequences that are done."""


@dataclass(frozen=True)
class AnswerScores:
    """How likely answers are, one entry each.

    Attributes:
        log_probs: summed over the answer's tokens, in nats.
        hits: tokens that are the likeliest at their place.
        tokens: of the answer.
    """

    log_probs: list[float]
    hits: list[int]
    tokens: list[int]


def answer_scores(
    model: Any, sequences: Sequences, *, batch_size: int, on_batch: OnBatch = untold
) -> AnswerScores:
    """Return the scores of the answers in (prompt, answer) token lists.

    Sequences go through in batches of like length.

    Args:
        model: of transformers.
        sequences: an empty answer has no tokens and a log-probability of 0.
        batch_size: sequences that go through at once.
        on_batch: called with the number of sequences after each batch.
    """
    head = output_head(model)
    count = len(sequences)
    scores = AnswerScores([0.0] * count, [0] * count, [0] * count)
    for rows in length_batches(sequences, batch_size):
        with torch.no_grad():
            batch = token_batch([sequences[row] for row in rows], model.device)
            for states, targets, owners in answer_chunks(answer_states(model, batch)):
                logits = head(states).float()
                log_probs = -functional.cross_entropy(logits, targets, reduction="none")
                hits = logits.argmax(dim=-1) == targets
                for log_prob, hit, owner in zip(
                    log_probs.tolist(), hits.tolist(), owners.tolist(), strict=True
                ):
                    scores.log_probs[rows[owner]] += log_prob
                    scores.hits[rows[owner]] += hit
                    scores.tokens[rows[owner]] += 1
        on_batch(len(rows))
    return scores


def length_batches(sequences: Sequences, batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences that go through together, shortest first.

    Those without an answer go through no model.
    """
    order = [row for row in range(len(sequences)) if sequences[row][1]]
    order.sort(key=lambda row: sum(map(len, sequences[row])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def answer_chunks(
    answers: tuple[Tensor, Tensor, Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what ``answer_states`` gives in pieces whose logits fit into memory."""
    yield from zip(*(tensor.split(CHUNK_POSITIONS) for tensor in answers), strict=True)


def answer_sequences(
    tokenizer: Any,
    examples: Sequence[tuple[Sequence[Message], str]],
    max_length: int,
    how: Rendering = AS_GIVEN,
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of prompts and answers, ``max_length`` of both together at most."""
    sequences = []
    for messages, answer in examples:
        found = encoded(tokenizer, messages, [answer], max_length, how)
        sequences.append((found.prompt, found.answers[0]))
    return sequences


def answer_loss(
    model: Any,
    tokenizer: Any,
    examples: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int,
) -> float:
    """Return the mean negative log-likelihood per answer token, in nats."""
    sequences = answer_sequences(tokenizer, examples, max_length)
    scores = answer_scores(model, sequences, batch_size=batch_size)
    return -sum(scores.log_probs) / sum(scores.tokens)


def preference_accuracy(
    model: Any, pairs: Sequence[EncodedPair], *, batch_size: int
) -> tuple[float, float]:
    """Return how often the safe answer is likelier per token, and by how many nats on average."""
    margins = preference_margins(model, pairs, batch_size=batch_size)
    return (
        sum(margin > 0 for margin in margins) / len(margins),
        sum(margins) / len(margins),
    )


def preference_margins(
    model: Any, pairs: Sequence[EncodedPair], *, batch_size: int, on_batch: OnBatch = untold
) -> list[float]:
    """Return by how many nats a token the safe answer of each pair is the likelier one."""
    sequences = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    scores = answer_scores(model, sequences, batch_size=batch_size, on_batch=on_batch)
    means = [total / tokens for total, tokens in zip(scores.log_probs, scores.tokens, strict=True)]
    return [chosen - rejected for chosen, rejected in zip(means[::2], means[1::2], strict=True)]


def comparable_pairs(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, how: Rendering = AS_GIVEN
) -> dict[int, EncodedPair]:
    """Return the tokens of each pair whose answers differ within ``max_length``, by its number."""
    found = {}
    for number, pair in enumerate(pairs):
        answers = (pair.chosen, pair.rejected)
        tokens = encoded(tokenizer, pair.messages, answers, max_length, how)
        prompt, (chosen, rejected) = tokens.prompt, tokens.answers
        if prompt and chosen and rejected and chosen != rejected:
            found[number] = EncodedPair(prompt, chosen, rejected)
    return found
