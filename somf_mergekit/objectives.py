"""Losses on the log-probabilities of whole answers."""

from torch import Tensor
from torch.nn import functional


def dpo_losses(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return the DPO loss and the reward margin of each pair (arXiv 2305.18290, equation 7).

    loss = -log sigmoid(margin), margin = beta [(log pi(y+) - log pi(y-)) - (log pi_ref(y+) -
    log pi_ref(y-))].

    Args:
        chosen: summed log-probabilities of the safe answers, (pairs,).
        rejected: of the unsafe answers, (pairs,).
        reference_chosen: the same under the fixed reference, (pairs,).
        reference_rejected: the same under the fixed reference, (pairs,).
        beta: strength of the pull towards the reference.

    Returns:
        losses (pairs,) and margins (pairs,), float32.
    """
    margins = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -functional.logsigmoid(margins), margins
