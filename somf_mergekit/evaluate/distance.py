"""How far a model's predictions are from another's, on the same answers."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.chat import AS_GIVEN, Message
from ..data.logprobs import answer_states, output_head, token_batch
from ..data.rendering import Rendering
from .likelihood import OnBatch, Sequences, answer_chunks, answer_sequences, length_batches, untold


def shared_sequences(
    tokenizer: Any,
    reference: Any,
    examples: Sequence[tuple[Sequence[Message], str]],
    max_length: int,
    how: Rendering = AS_GIVEN,
) -> Sequences | None:
    """Return the tokens of prompts and answers where both tokenizers agree on all of them.

    None where they don't: then the models predict different things, and have no distance.
    """
    one, two = (answer_sequences(t, examples, max_length, how) for t in (tokenizer, reference))
    return one if one == two else None


def divergence(
    model: Any,
    reference: Any,
    sequences: Sequences,
    *,
    batch_size: int,
    on_batch: OnBatch = untold,
) -> tuple[list[float], list[int]]:
    """Return KL(reference || model) summed over each answer's tokens, and how many they are.

    KL = sum over the vocabulary of p_ref (log p_ref - log p), in nats, at every place of an answer,
    given all that stands before it. Of vocabularies that differ in size, by padding or by added
    tokens, the part that both have is compared.
    """
    heads = output_head(model), output_head(reference)
    sums, tokens = [0.0] * len(sequences), [0] * len(sequences)
    for rows in length_batches(sequences, batch_size):
        with torch.no_grad():
            batch = token_batch([sequences[row] for row in rows], model.device)
            ours = answer_chunks(answer_states(model, batch))
            theirs = answer_chunks(answer_states(reference, batch))
            for (mine, _, owners), (other, _, _) in zip(ours, theirs, strict=True):
                logits = [head(s).float() for head, s in zip(heads, (mine, other), strict=True)]
                width = min(part.shape[-1] for part in logits)
                log_p, log_q = (part[:, :width].log_softmax(dim=-1) for part in logits)
                apart = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
                for value, owner in zip(apart.tolist(), owners.tolist(), strict=True):
                    sums[rows[owner]] += value
                    tokens[rows[owner]] += 1
        on_batch(len(rows))
    return sums, tokens
