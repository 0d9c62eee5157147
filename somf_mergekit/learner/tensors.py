"""One weight under its mask: what is kept of it, and the two steps of learning."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masking import concrete_sample, logit_gradient, masked_task_vector, uniform_noise

# Adam as in the measured defaults; a logit moves by about the learning rate a step.
ADAM_BETAS = (0.9, 0.95)
# Entries whose gradient is far below this, such as the embeddings of tokens that no pair has,
# stay about where they start.
ADAM_EPS = 1e-8


@dataclass
class MaskedTensor:
    """A weight W = base + D * m / mean(m) of the model that learns its mask.

    Attributes:
        name: of the tensor in the merged checkpoint.
        weight: the model's parameter; its values are written here.
        base: the base model's tensor, in the weight's shape.
        fused: D, the fused task vector, float32 in the weight's shape.
        temperature: of the concrete samples.
        rescale: see ``masking.mask_scale``.
        seed: of the noise.
        init_logit: where the logits start.
    """

    name: str
    weight: torch.nn.Parameter
    base: Tensor
    fused: Tensor
    temperature: float
    rescale: str
    seed: int
    init_logit: float
    logits: Tensor = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.logits = torch.full_like(self.fused, self.init_logit)
        self._optimizer = torch.optim.Adam(
            [self.logits], lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, foreach=False, fused=False
        )

    @torch.no_grad()
    def write_base(self) -> None:
        """Set the weight to the base model's."""
        self.weight.copy_(self.base)

    @torch.no_grad()
    def write_soft(self) -> None:
        """Set the weight to the merge under the present soft mask."""
        self._write(torch.sigmoid(self.logits))

    @torch.no_grad()
    def write_sample(self, step: int) -> None:
        """Set the weight to the merge under the concrete sample of ``step``."""
        self._write(self._sample(step))

    @torch.no_grad()
    def update(self, step: int, learning_rate: float) -> None:
        """Take one optimiser step on the logits from the weight's gradient, and free that."""
        if self.weight.grad is None:
            return
        self.logits.grad = logit_gradient(
            self.weight.grad, self.fused, self._sample(step), self.temperature, self.rescale
        )
        self.weight.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.logits.grad = None

    def _sample(self, step: int) -> Tensor:
        # Drawn again where it is needed rather than kept: it is a function of these four.
        uniform = uniform_noise(self.logits.shape, seed=self.seed, step=step, name=self.name)
        return concrete_sample(self.logits, uniform, self.temperature)

    def _write(self, mask: Tensor) -> None:
        masked = masked_task_vector(self.fused, mask, self.rescale)
        self.weight.copy_(masked.add_(self.base))
