"""Measures that several repairs share."""

import torch
from torch import Tensor


def cosine(first: Tensor, second: Tensor, dim: int | None = None) -> Tensor:
    """Return the cosine of two tensors of a shape, along ``dim`` or of all their entries.

    It is 0 where one of them is zero: nothing points nowhere.
    """
    sizes = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    products = (first * second).sum(dim=dim)
    return products / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
