"""Pairs and utility examples as batches for the model, and what it says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..learner.objectives import PER_TOKEN
from .logprobs import TokenBatch, answer_sums, token_batch
from .pairs import EncodedPair
from .prompts import EncodedAnswer


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

    def counted(self, objective: str) -> "PairLogProbs":
        """Return the same as an objective takes them: sums, or means over the tokens."""
        return self.per_token() if objective in PER_TOKEN else self

    def per_token(self) -> "PairLogProbs":
        """Return the same with means over the tokens in the place of sums."""
        return PairLogProbs(
            self.chosen / self.chosen_tokens,
            self.rejected / self.rejected_tokens,
            self.chosen_tokens,
            self.rejected_tokens,
        )


def pair_batch(
    pairs: Sequence[EncodedPair], device: torch.device | str, is_safe_alone: bool = False
) -> TokenBatch:
    """Return the safe answers of pairs, then the unsafe ones unless ``is_safe_alone``."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs]
    if not is_safe_alone:
        sequences += [(pair.prompt, pair.rejected) for pair in pairs]
    return token_batch(sequences, device)


def example_batch(examples: Sequence[EncodedAnswer], device: torch.device | str) -> TokenBatch:
    """Return utility examples."""
    return token_batch([(example.prompt, example.answer) for example in examples], device)


def pair_log_probs(log_probs: Tensor, owners: Tensor, count: int) -> PairLogProbs:
    """Return what the model makes of a ``pair_batch`` of both answers.

    Args:
        log_probs: of each token, (tokens,).
        owners: which sequence each is of, (tokens,).
        count: of the pairs.
    """
    sums, tokens = answer_sums(log_probs, owners, 2 * count)
    return PairLogProbs(sums[:count], sums[count:], tokens[:count], tokens[count:])


def pair_length(pair: EncodedPair) -> int:
    """Return the tokens of a pair's longer sequence."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def example_length(example: EncodedAnswer) -> int:
    """Return the tokens of a utility example."""
    return len(example.prompt) + len(example.answer)
