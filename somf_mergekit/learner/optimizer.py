"""The optimiser of the logits: no state, one pass."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Entries whose gradient is far below this, such as the embeddings of tokens that no pair has,
# stay about where they start.
EPS = 1e-8


class LogitOptimizer:
    """Moves a logit by about the learning rate against the sign of its gradient.

    The step is rate g / (|g| + EPS): Adam without memory of earlier steps.
    """

    def __init__(self, logits: Tensor):
        self._logits = logits

    def step(self, gradients: Iterable[tuple[slice, Tensor]], rate: float) -> Tensor:
        """Take one step, and return the squared norm of the gradient, float32.

        It is not finite where some entry of the gradient is not, or none can tell (above 1e19).

        Args:
            gradients: parts of the flattened logits with their gradients, float32, which are lost.
            rate: the learning rate of this step.
        """
        square = torch.zeros((), device=self._logits.device)
        for part, gradient in gradients:
            square += torch.dot(gradient, gradient)
            self._logits[part].sub_(gradient.div_(gradient.abs().add_(EPS)), alpha=rate)
        return square
