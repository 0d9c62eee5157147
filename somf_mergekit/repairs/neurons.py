"""Repair neuron by neuron: put rows of a safer model in the place of those that have changed."""

import math

import torch
from torch import Tensor

from .cosine import cosine
from .spectrum import low_rank_part


def nlsr(
    aligned: Tensor,
    fine_tuned: Tensor,
    unaligned: Tensor,
    *,
    beta: float,
    rank: int,
    share: float,
    threshold: float,
) -> Tensor:
    """Return the fine-tuned weight with some rows of a safer model's, W_aligned + beta V.

    V = W_aligned - W_unaligned is the safety vector. Replaced are rows that are critical for
    safety, those with the largest norm in V's best approximation of a rank, where the change from
    the unaligned model no longer resembles it: cosine(W_fine_tuned - W_unaligned, V) below the
    threshold. A tensor that is no matrix, and rows in which V is zero, stay fine-tuned.

    Source: NLSR, arXiv 2412.12497. Simplified: the score is of the weights alone (the paper's is of
    the layers' outputs on safety data), similarity is told row by row, and each tensor is judged
    for itself (the paper picks the layers to repair among all).

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        beta: how far the safer model lies beyond the aligned one.
        rank: of the approximation.
        share: of the rows that are critical, rounded up to whole ones.
        threshold: least cosine of a row that stays.
    """
    if aligned.dim() != 2:
        return fine_tuned
    safety = aligned - unaligned
    similarity = cosine(fine_tuned - unaligned, safety, dim=1)
    replaced = critical_rows(safety, rank, share) & (similarity < threshold)
    return torch.where(replaced.unsqueeze(1), aligned + beta * safety, fine_tuned)


def critical_rows(safety: Tensor, rank: int, share: float) -> Tensor:
    """Return which rows matter for safety, bool (rows,).

    Args:
        safety: V, (rows, columns).
        rank: of the approximation whose rows' norms are compared.
        share: of the rows, rounded up.
    """
    scores = torch.linalg.vector_norm(low_rank_part(safety, rank), dim=1)
    critical = torch.zeros_like(scores, dtype=torch.bool)
    # A tenth of 30 is a little more than 3 in floating point.
    count = math.ceil(round(share * len(scores), 6))
    critical[scores.topk(count).indices] = True
    # Rounding may give a score to rows that alignment has not changed.
    return critical & (safety != 0).any(dim=1)
