"""The singular values of a matrix, and the part of it that the largest of them make up."""

import math

import torch
from torch import Tensor

from ..common.chunks import row_blocks

# Entries that are in float64 at once.
_BLOCK = 1 << 22
# What rounding may add to exp(entropy) without another direction being counted.
_ROUNDING = 1e-6


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
    long = matrix if _is_tall(matrix) else matrix.T
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
    kept = vectors[:, :rank].to(matrix.dtype)
    # U_k U_k^T M = M V_k V_k^T: either singular vectors serve.
    return (matrix @ kept) @ kept.T if _is_tall(matrix) else kept @ (kept.T @ matrix)


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


def _is_tall(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return rows > columns
