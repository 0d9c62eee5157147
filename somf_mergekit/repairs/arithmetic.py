"""Repair by task arithmetic: add the safety vector."""

from torch import Tensor


def resta(aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, gamma: float) -> Tensor:
    """Return W_fine_tuned + gamma (W_aligned - W_unaligned), for tensors of any shape.

    Source: RESTA, arXiv 2402.11746. Without its optional DARE, which drops entries of the change
    that fine-tuning made.

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        gamma: how much of the safety vector is added.
    """
    return fine_tuned + gamma * (aligned - unaligned)
