"""Repairs of the weights whose change leaves the directions that alignment has changed.

With the safety vector V = W_aligned - W_unaligned of a weight (outputs, inputs), both judge the
change D = W_fine_tuned - W_aligned by the cosine of D and C D, C = V V^T / ||V||_F. C is what Safe
LoRA puts in the place of the projection V (V^T V)^-1 V^T: as it does not normalise the directions,
the size of C D grows with that of V. The cosine is never negative.
"""

import torch
from torch import Tensor

from .cosine import cosine


def safe_lora(
    aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, threshold: float
) -> Tensor:
    """Return W_aligned + C D where the cosine of D and C D is below the threshold.

    Elsewhere, and where the tensor is no matrix or V is zero, it is the fine-tuned weight.
    Source: Safe LoRA, arXiv 2405.16833, with D in the place of the adapter's product.

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        threshold: tau.
    """
    change = fine_tuned - aligned
    projected = safety_projection(change, aligned - unaligned)
    if projected is None or cosine(change, projected) >= threshold:
        return fine_tuned
    return aligned + projected


def safemerge(
    aligned: Tensor,
    fine_tuned: Tensor,
    unaligned: Tensor,
    safety_tuned: Tensor,
    *,
    threshold: float,
    alpha: float,
) -> Tensor:
    """Return W_aligned + alpha D + (1 - alpha) D_safe where the cosine of D and C D is below the
    threshold, with D_safe = W_safety_tuned - W_aligned.

    Elsewhere, and where the tensor is no matrix or V is zero, it is the fine-tuned weight.
    Source: SafeMERGE, arXiv 2503.17239, with D in the place of the adapter's product.

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        safety_tuned: of the safe model after fine-tuning on safe answers, the same shape.
        threshold: tau.
        alpha: the share of the fine-tuned model's change.
    """
    change = fine_tuned - aligned
    projected = safety_projection(change, aligned - unaligned)
    if projected is None or cosine(change, projected) >= threshold:
        return fine_tuned
    return aligned + alpha * change + (1 - alpha) * (safety_tuned - aligned)


def safety_projection(change: Tensor, safety: Tensor) -> Tensor | None:
    """Return C D = V V^T D / ||V||_F, None where it is not defined.

    Args:
        change: D, (outputs, inputs).
        safety: V, the same shape; where it is zero, or no matrix, C is not defined.
    """
    size = torch.linalg.vector_norm(safety)
    if safety.dim() != 2 or size == 0:
        return None
    unit = safety / size
    outputs, inputs = safety.shape
    # The smaller of the two square matrices is the one that is built.
    if outputs <= inputs:
        return (safety @ unit.T) @ change
    return safety @ (unit.T @ change)
