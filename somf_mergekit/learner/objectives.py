"""Losses on the log-probabilities of answers."""

from torch import Tensor
from torch.nn import functional

PREFERENCES = ("dpo", "dpo_norm", "ipo", "hinge")
# Those that compare log-probabilities per token, where the others take sums.
PER_TOKEN = ("dpo_norm", "ipo")


def preference_losses(objective: str, log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the loss and the reward margin, beta h, of each pair.

    h = (log pi(y+) - log pi(y-)) - (log pi_ref(y+) - log pi_ref(y-)).

    - ``dpo``: -log sigmoid(beta h) (arXiv 2305.18290, equation 7);
    - ``dpo_norm``: the same of log-probabilities per token (length-normalized DPO, arXiv
      2411.15124), so that long answers weigh no more than short ones;
    - ``ipo``: (h - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17), where h is taken from
      log-probabilities per token, as its authors do;
    - ``hinge``: max(0, 1 - beta h) (arXiv 2305.10425; with a reference, arXiv 2309.06657).

    Args:
        objective: one of PREFERENCES.
        log_ratio: h, (pairs,).
        beta: strength of the pull towards the reference.

    Returns:
        losses (pairs,) and margins (pairs,).

    Raises:
        ValueError: ``objective`` is unknown.
    """
    margins = beta * log_ratio
    if objective in ("dpo", "dpo_norm"):
        return -functional.logsigmoid(margins), margins
    if objective == "ipo":
        return (log_ratio - 1 / (2 * beta)).square(), margins
    if objective == "hinge":
        return functional.relu(1 - margins), margins
    raise ValueError(f"unknown objective {objective!r}: expected one of {', '.join(PREFERENCES)}")


def sft_losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean negative log-probability per token of each answer.

    Args:
        log_probs: summed over each answer's tokens, (answers,).
        tokens: of each answer, (answers,).
    """
    return -log_probs / tokens


def divergences(log_probs: Tensor, unmasked: Tensor) -> Tensor:
    """Return, token by token, how far the masked merge is from the unmasked one.

    (log p - log p_unmasked)^2 / 2: on tokens that the unmasked merge drew, its mean would estimate
    KL(unmasked || masked) (the estimator k2 of J. Schulman, "Approximating KL Divergence", 2020).
    Here the tokens are those of the given answers.

    Args:
        log_probs: of each token under the masked merge, (tokens,).
        unmasked: the same under the unmasked merge, (tokens,).
    """
    return 0.5 * (log_probs - unmasked).square()
