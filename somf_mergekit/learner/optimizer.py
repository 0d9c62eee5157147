"""The optimisers of the logits: each takes a step on one tensor, from its complete gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.chunks import pieces
from ..fusion.shards import Shard
from ..mask.masking import MaskSampler, mask_scale

# Of the mean size of a tensor's gradients: entries far below it hardly move.
EPS = 1e-5
# Of AdamW, as published: they are the defaults of transformers.
BETAS, ADAMW_EPS, MAX_NORM = (0.9, 0.999), 1e-8, 1.0
# Below the size of any gradient: where all are 0, nothing is divided by 0.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class FactorGradient:
    """G = dL/dc, one value per mask entry: as it is, or as the product of dL/dW and D.

    Attributes:
        gradient: dL/dW of the rows that this process has, complete; or G. ``logit_gradient``
            writes over it.
        delta: D, in the same shape; None where the gradient is G.
        sampler: the mask that the weight was written with.
        rescale: see ``masking.mask_scale``.
        shard: the rows that this process has; sums are over the whole mask.
        room: for as many numbers, which ``logit_gradient`` writes over.
    """

    gradient: Tensor
    delta: Tensor | None
    sampler: MaskSampler
    rescale: str
    shard: Shard
    room: Tensor


@dataclass(frozen=True)
class LogitGradient:
    """dL/dx of this process' logits, for m = sigmoid((x + noise) / T) and c = m / mean(m).

    With n entries, s = mean(m) and G = dL/dc: dL/dm = G / s - (sum G m) / (s^2 n), and dm/dx =
    m (1 - m) / T. Where the fusion is linear, W = start + D c, an entry's G is the sum of dL/dW D
    over the weights that it covers. The first term is the entry's own; the second is shared, for a
    change of any entry changes the mask's mean. Without the rescale, s = 1 and there is no second.

    Attributes:
        products: G m (1 - m), (count,).
        slopes: m (1 - m), (count,).
        of_products: 1 / (s T).
        of_slopes: (sum G m) / (s^2 n T), or 0.
        size: mean size of the own terms, of the whole mask.
    """

    products: Tensor
    slopes: Tensor
    of_products: float
    of_slopes: float
    size: float

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield parts of the entries with dL/dx and its own term, new float32 tensors."""
        for part in pieces(len(self.products), self.products.device):
            own = self.products[part].float() * self.of_products
            yield part, own.sub(self.slopes[part], alpha=self.of_slopes), own

    def square(self) -> Tensor:
        """Return the squared norm of dL/dx, float32: not finite where some entry is not."""
        square = torch.zeros((), device=self.products.device)
        for _, gradient, _ in self.parts():
            square += torch.dot(gradient, gradient)
        return square


def logit_gradient(of_factor: FactorGradient) -> LogitGradient:
    """Return dL/dx from dL/dc; it takes over the memory of what it is given."""
    rescale, shard, sampler = of_factor.rescale, of_factor.shard, of_factor.sampler
    products, slopes = of_factor.gradient.reshape(-1), of_factor.room.view(-1)
    sums = torch.zeros(3, device=products.device)
    for part in pieces(len(products), products.device):
        mask = sampler.part(part)
        product = products[part].float()
        if of_factor.delta is not None:
            product = product.mul_(of_factor.delta.view(-1)[part])
        slope = torch.addcmul(mask, mask, mask, value=-1)
        weighted = torch.dot(product, mask)
        product.mul_(slope)
        sums += torch.stack([mask.sum(), weighted, product.abs().sum()])
        products[part], slopes[part] = product, slope
    total, weighted, size = shard.add_up(sums).double()
    scale = mask_scale(total / shard.entries, rescale) / sampler.temperature
    common = weighted * scale * scale * sampler.temperature if rescale == "mean" else 0.0
    return LogitGradient(
        products,
        slopes,
        float(scale),
        float(common / shard.entries),
        float(size * scale / shard.entries),
    )


def signsgd_step(logits: Tensor, found: LogitGradient, rate: float) -> Tensor:
    """Move each logit by the learning rate against the sign of its gradient, in place.

    This is signSGD (arXiv 1802.04434), but that an entry whose own term of the gradient is next to
    nothing stays where it is: with a the smaller size of the two, the step is rate sign(g) a /
    (a + e), where e is EPS times the mean size of the own terms. Such entries are the embeddings of
    tokens that no pair has, and what TIES has trimmed: the term that all share would move them all.

    Args:
        logits: flattened.
        found: their gradient.
        rate: the learning rate of this step.

    Returns:
        The squared norm of the gradient, float32: not finite where some entry of the gradient is
        not, or it overflows (above 1e19).
    """
    square = torch.zeros((), device=logits.device)
    floor = max(EPS * found.size, TINY)
    for part, gradient, own in found.parts():
        square += torch.dot(gradient, gradient)
        size = torch.minimum(gradient.abs(), own.abs_())
        logits[part].sub_(size.div_(size + floor).copysign_(gradient), alpha=rate)
    return square


def adamw_step(
    logits: Tensor, moments: Tensor, found: LogitGradient, rate: float, step: int, clip: float
) -> None:
    """Take a step of AdamW without decay (arXiv 1711.05101) on the logits, in place.

    Args:
        logits: flattened.
        moments: running means of the gradient and of its square, (2, count), float32.
        found: the logits' gradient.
        rate: the learning rate of this step.
        step: its number, from 0.
        clip: what the gradient is multiplied with, see ``clip_factor``.
    """
    first, second = moments
    of_first, of_second = BETAS
    for part, gradient, _ in found.parts():
        gradient.mul_(clip)
        mean = first[part].lerp_(gradient, 1 - of_first)
        square = second[part].mul_(of_second).addcmul_(gradient, gradient, value=1 - of_second)
        size = square.sqrt().div_((1 - of_second ** (step + 1)) ** 0.5).add_(ADAMW_EPS)
        logits[part].addcdiv_(mean, size, value=-rate / (1 - of_first ** (step + 1)))


def clip_factor(square: float) -> float:
    """Return what a gradient of this squared norm is multiplied with for its norm to be 1 at most.

    As ``torch.nn.utils.clip_grad_norm_`` does, of the gradient of all logits.
    """
    return min(1.0, MAX_NORM / (square**0.5 + 1e-6))
