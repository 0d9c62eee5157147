"""One weight under its mask: what is kept of it, and the two steps of learning."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..granularity import Layout
from ..masking import concrete_sample, logit_gradient, mask_factor, uniform_noise
from ..weights import MergedWeight

# Adam as in the measured defaults; a logit moves by about the learning rate a step.
ADAM_BETAS = (0.9, 0.95)
# Entries whose gradient is far below this, such as the embeddings of tokens that no pair has,
# stay about where they start.
ADAM_EPS = 1e-8


@dataclass
class FixedTensor:
    """A weight that is merged without a mask.

    Attributes:
        weight: the model's parameter; its values are written here.
        base: the base model's tensor.
        merged: the plain merge's.
    """

    weight: Tensor
    base: Tensor
    merged: Tensor

    @torch.no_grad()
    def write_base(self) -> None:
        """Set the weight to the base model's."""
        self.weight.copy_(self.base)

    @torch.no_grad()
    def write_unmasked(self) -> None:
        """Set the weight to the merge's."""
        self.weight.copy_(self.merged)


@dataclass
class MaskedTensor:
    """A weight of the model that learns its mask.

    Attributes:
        name: of the tensor in the merged checkpoint.
        weight: the model's parameter; its values are written here.
        base: the base model's tensor, in the weight's shape.
        merged: the merged weight as a function of the mask's factor.
        layout: how the mask's entries lie on the weight.
        temperature: of the concrete samples.
        rescale: see ``masking.mask_scale``.
        seed: of the noise.
        init_logit: where the logits start.
        learning_rate: at the schedule's peak.
    """

    name: str
    weight: torch.nn.Parameter
    base: Tensor
    merged: MergedWeight
    layout: Layout
    temperature: float
    rescale: str
    seed: int
    init_logit: float
    learning_rate: float
    logits: Tensor = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.logits = torch.full(
            self.layout.shape, self.init_logit, dtype=torch.float32, device=self.base.device
        )
        self._optimizer = torch.optim.Adam(
            [self.logits], lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, foreach=False, fused=False
        )

    @torch.no_grad()
    def write_base(self) -> None:
        """Set the weight to the base model's."""
        self.weight.copy_(self.base)

    @torch.no_grad()
    def write_unmasked(self) -> None:
        """Set the weight to the plain merge's."""
        self.weight.copy_(self.merged.merged(torch.ones((), device=self.base.device)))

    @torch.no_grad()
    def write_soft(self) -> None:
        """Set the weight to the merge under the present soft mask."""
        self._write(torch.sigmoid(self.logits))

    @torch.no_grad()
    def write_sample(self, step: int) -> None:
        """Set the weight to the merge under the concrete sample of ``step``."""
        self._write(self._sample(step))

    @torch.no_grad()
    def write_untrained_sample(self, step: int) -> None:
        """Set the weight to the merge under a sample, of its own, of the mask's start."""
        start = torch.full_like(self.logits, self.init_logit)
        self._write(self._drawn(start, step, f"untrained/{self.name}"))

    @torch.no_grad()
    def update(self, step: int, rate_share: float) -> None:
        """Take one optimiser step on the logits from the weight's gradient, and free that.

        Args:
            step: whose sample the gradient was taken at.
            rate_share: of the learning rate at its peak, from 0 to 1.
        """
        if self.weight.grad is None:
            return
        sample = self._sample(step)
        gradient = self.merged.factor_gradient(
            self.weight.grad, mask_factor(sample, self.rescale), self.layout
        )
        self.weight.grad = None
        self.logits.grad = logit_gradient(gradient, sample, self.temperature, self.rescale)
        for group in self._optimizer.param_groups:
            group["lr"] = rate_share * self.learning_rate
        self._optimizer.step()
        self.logits.grad = None

    def _sample(self, step: int) -> Tensor:
        # Drawn again where it is needed rather than kept: it is a function of these four.
        return self._drawn(self.logits, step, self.name)

    def _drawn(self, logits: Tensor, step: int, name: str) -> Tensor:
        uniform = uniform_noise(logits.shape, seed=self.seed, step=step, name=name)
        return concrete_sample(logits, uniform, self.temperature)

    def _write(self, mask: Tensor) -> None:
        factor = self.layout.spread(mask_factor(mask, self.rescale))
        self.weight.copy_(self.merged.merged(factor))
