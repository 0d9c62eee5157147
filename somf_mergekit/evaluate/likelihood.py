"""Measures that need no generation: likelihood of answers, preference, distance between models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.chat import AS_GIVEN, Message, encoded
from ..data.encoding import EncodedPair
from ..data.logprobs import CHUNK_POSITIONS, answer_states, output_head, token_batch
from ..data.pairs import Pair
from ..data.rendering import Rendering

# Tokens of prompts with those of their answers.
Sequences = Sequence[tuple[list[int], list[int]]]
# Called with the number of sequences after each batch of them.
OnBatch = Callable[[int], object]


def no_report(count: int) -> None:
    """Report to no one that ``count`` sequences are done."""


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


def answer_sequences(
    tokenizer: Any,
    examples: Sequence[tuple[Sequence[Message], str]],
    max_length: int,
    how: Rendering = AS_GIVEN,
    *,
    closed: bool = True,
) -> Sequences:
    """Return the tokens of prompts and answers, ``max_length`` of both at most; see ``encoded``."""
    tokens = [
        encoded(tokenizer, messages, [answer], max_length, how, closed=closed)
        for messages, answer in examples
    ]
    return [(found.prompt, found.answers[0]) for found in tokens]


def answer_scores(
    model: Any, sequences: Sequences, *, batch_size: int, on_batch: OnBatch = no_report
) -> AnswerScores:
    """Return the scores of answers; an empty one has no tokens and a log-probability of 0."""
    count = len(sequences)
    scores = AnswerScores([0.0] * count, [0] * count, [0] * count)
    for rows, (logits,), targets in _answer_logits([model], sequences, batch_size, on_batch):
        log_probs = -functional.cross_entropy(logits, targets, reduction="none")
        hits = logits.argmax(dim=-1) == targets
        for row, log_prob, hit in zip(rows, log_probs.tolist(), hits.tolist(), strict=True):
            scores.log_probs[row] += log_prob
            scores.hits[row] += hit
            scores.tokens[row] += 1
    return scores


def divergence(
    model: Any,
    reference: Any,
    sequences: Sequences,
    *,
    batch_size: int,
    on_batch: OnBatch = no_report,
) -> tuple[list[float], list[int]]:
    """Return KL(reference || model) summed over each answer's tokens, and how many they are.

    KL = sum over the vocabulary of p_ref (log p_ref - log p), in nats, at every place of an answer,
    given all that stands before it. Of vocabularies that differ in size, by padding or by added
    tokens, the part that both have is compared.
    """
    sums, tokens = [0.0] * len(sequences), [0] * len(sequences)
    models = [model, reference]
    for rows, logits, _ in _answer_logits(models, sequences, batch_size, on_batch):
        width = min(part.shape[-1] for part in logits)
        log_p, log_ref = (part[:, :width].log_softmax(dim=-1) for part in logits)
        kl = (log_ref.exp() * (log_ref - log_p)).sum(dim=-1)
        for row, value in zip(rows, kl.tolist(), strict=True):
            sums[row] += value
            tokens[row] += 1
    return sums, tokens


@torch.no_grad()
def _answer_logits(
    models: Sequence[Any], sequences: Sequences, batch_size: int, on_batch: OnBatch
) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
    """Yield the models' logits at the places of answers' tokens, a few of these at a time.

    Sequences go through in batches of like length; those without an answer go through no model.

    Yields:
        The number of each token's sequence; float32 (tokens, vocabulary) of each model; the tokens
        themselves, int64 (tokens,).
    """
    heads = [output_head(model) for model in models]
    order = [row for row in range(len(sequences)) if sequences[row][1]]
    order.sort(key=lambda row: sum(map(len, sequences[row])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = token_batch([sequences[row] for row in rows], models[0].device)
        found = [answer_states(model, batch) for model in models]
        _, targets, owners = found[0]
        tensors = [targets, owners, *(states for states, _, _ in found)]
        # The logits of all tokens would not fit into memory.
        chunks = zip(*(tensor.split(CHUNK_POSITIONS) for tensor in tensors), strict=True)
        for some, of, *states in chunks:
            logits = [head(part).float() for head, part in zip(heads, states, strict=True)]
            yield [rows[owner] for owner in of.tolist()], logits, some
        on_batch(len(rows))


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
    right = sum(margin > 0 for margin in margins)
    return right / len(margins), sum(margins) / len(margins)


def preference_margins(
    model: Any, pairs: Sequence[EncodedPair], *, batch_size: int, on_batch: OnBatch = no_report
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
