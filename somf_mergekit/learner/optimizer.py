"""The optimiser of the logits: no state, one pass."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Entries whose gradient is far below this, such as the embeddings of tokens that no pair has,
# stay about where they start.
EPS = 1e-8


def step_logits(logits: Tensor, gradients: Iterable[tuple[slice, Tensor]], rate: float) -> Tensor:
    """Move each logit by about the learning rate against the sign of its gradient.

    The step is rate g / (|g| + EPS): Adam without memory of earlier steps.

    Args:
        logits: flattened.
        gradients: parts of the logits with their gradients, float32, which are lost.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the gradient, float32: not finite where some entry of the gradient is
        not, or none can tell (above 1e19).
    """
    square = torch.zeros((), device=logits.device)
    for part, gradient in gradients:
        square += torch.dot(gradient, gradient)
        logits[part].sub_(gradient.div_(gradient.abs().add_(EPS)), alpha=rate)
    return square
