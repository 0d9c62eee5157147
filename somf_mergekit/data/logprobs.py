"""Batches of prompts with answers, and the answers' log-probabilities.

The logits of a whole batch never exist at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..common.errors import RecipeError
from ..common.model_classes import text_decoder
from .encoding import EncodedPair

IGNORED = -100
# Positions whose logits exist at the same time: 256 x 50,000 float32 are 50 MB.
CHUNK_POSITIONS = 256


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences.

    Attributes:
        input_ids: int64 (sequences, length).
        attention_mask: int64 (sequences, length), 0 at padding.
        labels: int64 (sequences, length), the answer's tokens, -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def token_batch(
    sequences: Sequence[tuple[list[int], list[int]]], device: torch.device | str = "cpu"
) -> TokenBatch:
    """Return the (prompt, answer) token lists as one right-padded batch."""
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attention[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return TokenBatch(ids.to(device), attention.to(device), labels.to(device))


def pair_batch(
    pairs: Sequence[EncodedPair], device: torch.device | str, is_safe_alone: bool = False
) -> TokenBatch:
    """Return the safe answers of pairs, then the unsafe ones unless ``is_safe_alone``."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs]
    if not is_safe_alone:
        sequences += [(pair.prompt, pair.rejected) for pair in pairs]
    return token_batch(sequences, device)


def pair_length(pair: EncodedPair) -> int:
    """Return the tokens of a pair's longer sequence."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from last hidden states (n, hidden) to logits (n, vocabulary).

    It is compared with the model's own forward once, so that an architecture which treats its
    logits in a way unknown here is noticed and not learned on wrongly.

    Raises:
        RecipeError: the model's logits are not reproduced.
    """
    projection = model.get_output_embeddings()
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        if divisor:
            logits = logits / divisor
        if factor:
            logits = logits * factor
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    device = next(model.parameters()).device
    probe = torch.arange(4, device=device)[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=probe, use_cache=False).logits[0].float()
        found = head(_hidden_states(model, probe, torch.ones_like(probe))[0]).float()
    # Logits that are NaN are the model's own.
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise RecipeError(
            f"{type(model).__name__} computes its logits in a way that is not supported"
        )
    return head


def answer_token_log_probs(
    model: Any, head: Callable[[Tensor], Tensor], batch: TokenBatch
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every answer's token, and which sequence it is of.

    Logits are computed for the answers' positions alone, in chunks, and computed again in the
    backward pass.

    Returns:
        float32 (tokens,), sequence after sequence, and int64 (tokens,).
    """
    states, tokens, owners = answer_states(model, batch)
    pieces = [
        checkpoint(_token_log_probs, head, s, t, use_reentrant=False)
        for s, t in zip(states.split(CHUNK_POSITIONS), tokens.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(pieces), owners


def answer_states(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each token of the answers is predicted from, the token, and its sequence.

    Returns:
        last hidden states (tokens, hidden), int64 (tokens,) and int64 (tokens,), sequence after
        sequence.
    """
    hidden = _hidden_states(model, batch.input_ids, batch.attention_mask)
    targets = batch.labels[:, 1:]
    answered = targets != IGNORED
    return hidden[:, :-1][answered], targets[answered], answered.nonzero()[:, 0]


def answer_sums(log_probs: Tensor, owners: Tensor, answers: int) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability of each answer and its number of tokens.

    Args:
        log_probs: as ``answer_token_log_probs`` gives them.
        owners: likewise.
        answers: how many there are.

    Returns:
        float32 (answers,) and int64 (answers,).
    """
    sums = torch.zeros(answers, dtype=torch.float32, device=log_probs.device)
    counts = torch.zeros(answers, dtype=torch.int64, device=log_probs.device)
    return sums.index_add(0, owners, log_probs), counts.index_add(
        0, owners, torch.ones_like(owners)
    )


@dataclass(frozen=True)
class PairLogProbs:
    """Summed log-probabilities of the answers of pairs, and their tokens, (pairs,) each."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def ratios(self) -> Tensor:
        """log pi(y+) - log pi(y-), (pairs,)."""
        return self.chosen - self.rejected

    def counted(self, per_token: bool) -> "PairLogProbs":
        """Return the same with means over the tokens in the place of sums, where ``per_token``."""
        if not per_token:
            return self
        chosen, rejected = self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
        return replace(self, chosen=chosen, rejected=rejected)


def pair_log_probs(log_probs: Tensor, owners: Tensor, count: int) -> PairLogProbs:
    """Return the log-probabilities of a ``pair_batch`` of both answers.

    Args:
        log_probs: of each token, (tokens,).
        owners: which sequence each is of, (tokens,).
        count: of the pairs.
    """
    sums, tokens = answer_sums(log_probs, owners, 2 * count)
    return PairLogProbs(sums[:count], sums[count:], tokens[:count], tokens[count:])


def _token_log_probs(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor) -> Tensor:
    return -functional.cross_entropy(head(states).float(), tokens, reduction="none")


def _hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    decoder = text_decoder(model)
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
