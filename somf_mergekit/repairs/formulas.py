"""The repairs' formulas, on one weight at a time.

The weights are float32 and of one shape: ``aligned``, of the safe model; ``fine_tuned``, of the
model to repair; ``unaligned``, of the safe model before it was aligned; ``safety_tuned``, of the
safe model after fine-tuning on safe answers. V = W_aligned - W_unaligned is the safety vector, and
D = W_fine_tuned - W_aligned the change that fine-tuning made. All but RESTA leave a tensor that
isn't a matrix fine-tuned.
"""

import math

import torch
from torch import Tensor

from ..common.chunks import row_blocks

# Entries that are in float64 at once.
_BLOCK = 1 << 22
# What rounding may add to exp(entropy) without another direction being counted.
_ROUNDING = 1e-6


def resta(aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, gamma: float) -> Tensor:
    """Return W_fine_tuned + gamma V, for tensors of any shape.

    Source: RESTA, arXiv 2402.11746. Without its optional DARE, which drops entries of D.
    """
    return fine_tuned + gamma * (aligned - unaligned)


def lox(
    aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, alpha: float, rank: int
) -> Tensor:
    """Return W_fine_tuned + alpha U_k U_k^T V, with the first k = rank left singular vectors of V.

    Where a matrix has no such rank, V is added whole. Source: LoX, arXiv 2506.15606, which adds the
    same to the aligned model before it is fine-tuned (here ``fine_tuned`` = ``aligned``), so that
    fine-tuning harms it less; added to the model after fine-tuning it is a repair.
    """
    if aligned.dim() != 2:
        return fine_tuned
    return fine_tuned + alpha * low_rank_part(aligned - unaligned, rank)


def lssf(aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, alpha: float) -> Tensor:
    """Return W_fine_tuned + alpha U_r U_r^T V, with a rank r of each tensor's own.

    Source: LSSF, arXiv 2602.00038. Simplified: the rank is ``entropy_rank``, the effective
    rank by the entropy of the normalised squared singular values, in the place of the paper's own
    rule on its safety singular value entropy.
    """
    if aligned.dim() != 2:
        return fine_tuned
    safety = aligned - unaligned
    squares, vectors = spectrum(safety)
    return fine_tuned + alpha * principal_part(safety, vectors, entropy_rank(squares))


def safe_lora(
    aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, *, threshold: float
) -> Tensor:
    """Return W_aligned + C D where the cosine of D and C D is below the threshold.

    Elsewhere, and where V is zero, it is the fine-tuned weight. See ``_safety_projection`` for C.
    Source: Safe LoRA, arXiv 2405.16833, with D in the place of the adapter's product.
    """
    change = fine_tuned - aligned
    projected = _safety_projection(change, aligned - unaligned)
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
    """Return W_aligned + alpha D + (1 - alpha) (W_safety_tuned - W_aligned) where the cosine of D
    and C D is below the threshold.

    Elsewhere, and where V is zero, it is the fine-tuned weight. See ``_safety_projection`` for C.
    Source: SafeMERGE, arXiv 2503.17239, with D in the place of the adapter's product.
    """
    change = fine_tuned - aligned
    projected = _safety_projection(change, aligned - unaligned)
    if projected is None or cosine(change, projected) >= threshold:
        return fine_tuned
    return aligned + alpha * change + (1 - alpha) * (safety_tuned - aligned)


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

    Replaced are rows that are critical for safety, see ``critical_rows``, where the change from the
    unaligned model no longer resembles V: cosine(W_fine_tuned - W_unaligned, V) < threshold.

    Source: NLSR, arXiv 2412.12497. Simplified: the score is of the weights alone (the paper's is of
    the layers' outputs on safety data), similarity is judged row by row, and each tensor for itself
    (the paper picks the layers to repair among all).
    """
    if aligned.dim() != 2:
        return fine_tuned
    safety = aligned - unaligned
    similarity = cosine(fine_tuned - unaligned, safety, dim=1)
    replaced = critical_rows(safety, rank, share) & (similarity < threshold)
    return torch.where(replaced.unsqueeze(1), aligned + beta * safety, fine_tuned)


def critical_rows(safety: Tensor, rank: int, share: float) -> Tensor:
    """Return which rows matter for safety, bool (rows,): those with the largest norm.

    Args:
        safety: V, (rows, columns).
        rank: of the approximation of V whose rows' norms are compared.
        share: of the rows, rounded up. A row in which V is zero never counts.
    """
    scores = torch.linalg.vector_norm(low_rank_part(safety, rank), dim=1)
    critical = torch.zeros_like(scores, dtype=torch.bool)
    # A tenth of 30 is a little more than 3 in floating point.
    count = math.ceil(round(share * len(scores), 6))
    critical[scores.topk(count).indices] = True
    # Rounding may give a score to rows that alignment has not changed.
    return critical & (safety != 0).any(dim=1)


def cosine(first: Tensor, second: Tensor, dim: int | None = None) -> Tensor:
    """Return the cosine of two tensors of a shape, along ``dim`` or of all their entries.

    It is 0 where one of them is zero: nothing points nowhere.
    """
    sizes = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    products = (first * second).sum(dim=dim)
    return products / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values and the singular vectors along the shorter axis.

    They are the eigenvalues and eigenvectors of the smaller Gram matrix, in float64: for matrices
    in float32 as exact as a decomposition of the matrix itself, the same at each run, and cheaper
    where one axis is much longer.

    Args:
        matrix: float32, (rows, columns).

    Returns:
        Squares (n,) in descending order and vectors (n, n) as columns, n = min(rows, columns),
        both float64. The vectors are the left ones where there are fewer rows than columns.
    """
    long = matrix if len(matrix) > matrix.shape[1] else matrix.T
    count = long.shape[1]
    gram = torch.zeros(count, count, dtype=torch.float64, device=matrix.device)
    for rows in row_blocks(long, _BLOCK):
        part = long[rows].double()
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp_min(0).flip(0), vectors.flip(1)


def principal_part(matrix: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank, U_k U_k^T M = U_k S_k V_k^T, float32.

    Args:
        matrix: M, float32, (rows, columns).
        vectors: from ``spectrum``.
        rank: k.
    """
    first = vectors[:, :rank].to(matrix.dtype)
    # U_k U_k^T M = M V_k V_k^T: either singular vectors serve.
    if len(matrix) > matrix.shape[1]:
        return (matrix @ first) @ first.T
    return first @ (first.T @ matrix)


def low_rank_part(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank; the matrix itself where it has no higher one.

    Args:
        matrix: float32, (rows, columns).
        rank: at least 1.
    """
    if rank >= min(matrix.shape):
        return matrix
    return principal_part(matrix, spectrum(matrix)[1], rank)


def entropy_rank(squares: Tensor) -> int:
    """Return how many singular values count: exp(H), rounded up; 0 where all are zero.

    H = -sum p ln p with p = s^2 / sum s^2: n equal values count as n, and a single one as 1.

    Args:
        squares: s^2, float64, (n,).
    """
    total = squares.sum()
    if total == 0:
        return 0
    entropy = torch.special.entr(squares / total).sum().item()
    return min(math.ceil(math.exp(entropy) - _ROUNDING), len(squares))


def _safety_projection(change: Tensor, safety: Tensor) -> Tensor | None:
    """Return C D with C = V V^T / ||V||_F, None where V is zero or isn't a matrix.

    C is what Safe LoRA puts in the place of the projection V (V^T V)^-1 V^T: as it does not
    normalise the directions, the size of C D grows with that of V. The cosine of D and C D is never
    negative.

    Args:
        change: D, (outputs, inputs).
        safety: V, the same shape.
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
