"""Repairs that add the principal part of the safety vector V = W_aligned - W_unaligned."""

from torch import Tensor

from .spectrum import entropy_rank, low_rank_part, principal_part, spectrum


def lox(
    aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, alpha: float, rank: int
) -> Tensor:
    """Return W_fine_tuned + alpha U_k U_k^T V, with the first k left singular vectors of V.

    A tensor that is no matrix stays fine-tuned. Source: LoX, arXiv 2506.15606, which adds the same
    to the aligned model before it is fine-tuned (here ``fine_tuned`` = ``aligned``), so that
    fine-tuning harms it less; added to the model after fine-tuning it is a repair.

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        alpha: how much is added.
        rank: k; where a matrix has no such rank, V is added whole.
    """
    if aligned.dim() != 2:
        return fine_tuned
    return fine_tuned + alpha * low_rank_part(aligned - unaligned, rank)


def lssf(aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, alpha: float) -> Tensor:
    """Return W_fine_tuned + alpha U_r U_r^T V, with a rank r of each tensor's own.

    A tensor that is no matrix stays fine-tuned. Source: LSSF, arXiv 2602.00038. Simplified: the
    rank is ``spectrum.entropy_rank``, the effective rank by the entropy of the normalised squared
    singular values, in the place of the paper's own rule on its safety singular value entropy.

    Args:
        aligned: weights of the safe model, float32.
        fine_tuned: of the model to repair, the same shape.
        unaligned: of the safe model before it was aligned, the same shape.
        alpha: how much is added.
    """
    if aligned.dim() != 2:
        return fine_tuned
    safety = aligned - unaligned
    squares, vectors = spectrum(safety)
    return fine_tuned + alpha * principal_part(safety, vectors, entropy_rank(squares))
