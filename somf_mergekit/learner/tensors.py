"""One weight under its mask: what is kept of it, and the two steps of learning."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from ..fusion.shards import Shard
from ..fusion.weights import LinearWeight, MergedWeight
from ..mask.granularity import Layout
from ..mask.masking import MERGE_STEP, mask_factor
from ..mask.noise import noise_key
from .draws import Draw, Mask, MergedMask
from .entrywise import write_masked
from .optimizer import LogitGradient, adamw_step, logit_gradient, signsgd_step
from .triton_check import kernels_for
from .whole import whole_mask


class Content(Enum):
    """What a model's weights are."""

    BASE = "the base model's"
    UNMASKED = "those of the plain merge"
    SOFT = "the merge under the present soft mask"
    SAMPLE = "the merge under the concrete sample of a step"
    UNTRAINED_SAMPLE = "the merge under a sample, of its own, of the mask's start"
    MERGED = "the merge under the present mask, stored and used as a merge does"


@dataclass(frozen=True)
class State:
    """What a model's weights are, of a step where that matters."""

    content: Content
    step: int = 0

    @property
    def of_fixed(self) -> Content:
        """What weights without a mask are."""
        return Content.BASE if self.content is Content.BASE else Content.UNMASKED


@dataclass
class FixedTensor:
    """A weight without a mask.

    Attributes:
        weight: the model's parameter; its values are written here.
        shard: the rows that this process keeps of what follows.
        base: the base model's tensor.
        merged: the merged weight; None where it is the base's.
    """

    weight: Tensor
    shard: Shard
    base: Tensor
    merged: MergedWeight | None

    @torch.no_grad()
    def write(self, state: State) -> None:
        """Set the weight to the base's or the plain merge's."""
        own = self.shard.own(self.weight)
        if self.merged is None or state.of_fixed is Content.BASE:
            own.copy_(self.base)
        else:
            self.merged.write(own, torch.ones((), device=own.device))
        self.shard.gather(self.weight)


@dataclass
class MaskedTensor:
    """A weight of the model that learns its mask.

    Attributes:
        name: of the tensor in the merged checkpoint.
        weight: the model's parameter; its values are written here.
        shard: the rows that this process keeps of the base, the merged weight, and of logits that
            have the weight's shape.
        base: the base model's tensor.
        merged: the merged weight as a function of the mask's factor.
        layout: how the mask's entries lie on the whole weight.
        logits: of the mask, float32, one per entry; learned in place.
        temperature: of the concrete samples.
        rescale: see ``masking.mask_scale``.
        seed: of the noise.
        init_logit: where the logits start.
        learning_rate: at the schedule's peak.
        kind: of the mask that the merge uses, one of ``masking.MASK_KINDS``.
        moments: what AdamW keeps of earlier steps, (2, *shape of the logits), float32; None under
            signSGD, which keeps nothing.
        gradient_square: squared norm of the gradient of the latest update, of the logits that this
            process keeps; None where there was none.
    """

    name: str
    weight: torch.nn.Parameter
    shard: Shard
    base: Tensor
    merged: MergedWeight
    layout: Layout
    logits: Tensor
    temperature: float
    rescale: str
    seed: int
    init_logit: float
    learning_rate: float
    kind: str = "soft"
    moments: Tensor | None = None
    gradient_square: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def write(self, state: State) -> None:
        """Set the weight to what ``state`` says."""
        entries = self.logits.view(-1)
        own = self.shard.own(self.weight)
        match state.content:
            case Content.BASE:
                own.copy_(self.base)
            case Content.UNMASKED:
                self.merged.write(own, torch.ones((), device=own.device))
            case Content.SOFT:
                self._write(self._drawn(entries, None))
            case Content.SAMPLE:
                self._write(self._sample(state.step))
            case Content.UNTRAINED_SAMPLE:
                start = torch.tensor(self.init_logit, device=self.logits.device)
                key = noise_key(seed=self.seed, step=state.step, name=f"untrained/{self.name}")
                self._write(self._drawn(start.expand(self.logits.numel()), key))
            case Content.MERGED:
                key = noise_key(seed=self.seed, step=MERGE_STEP, name=self.name)
                self._write(MergedMask(self._drawn(entries, key), self.kind))
        self.shard.gather(self.weight)

    @torch.no_grad()
    def update(self, gradient: Tensor, step: int, rate_share: float) -> None:
        """Take a step of signSGD on the logits from the weight's gradient.

        The weight's own values and the gradient's are lost: the next step makes them anew.

        Args:
            gradient: dL/dW of the rows that are kept, complete.
            step: whose sample the weight was written with.
            rate_share: of the learning rate at its peak, from 0 to 1.
        """
        rate = rate_share * self.learning_rate
        # The sample is drawn again rather than kept: it is a function of logits, seed and step.
        draw = self._sample(step)
        gradient, fused, room, shard = self._factor_gradient(gradient, draw)
        kernels = kernels_for(gradient.device)
        if kernels:
            arguments = (gradient, fused, draw, self.rescale, shard, rate)
            self.gradient_square = kernels.update_logits(*arguments)
            return
        found = logit_gradient(gradient, fused, room, draw, self.rescale, shard)
        self.gradient_square = signsgd_step(draw.logits, found, rate)

    @torch.no_grad()
    def measured(self, gradient: Tensor, step: int) -> LogitGradient:
        """Return the logits' gradient, for ``move``.

        Arguments, and what is lost, are those of ``update``.
        """
        draw = self._sample(step)
        gradient, fused, room, shard = self._factor_gradient(gradient, draw)
        found = logit_gradient(gradient, fused, room, draw, self.rescale, shard)
        self.gradient_square = found.square()
        return found

    @torch.no_grad()
    def move(self, found: LogitGradient, step: int, rate_share: float, clip: float) -> None:
        """Take a step of AdamW; arguments as of ``update`` and ``optimizer.adamw_step``."""
        assert self.moments is not None
        rate = rate_share * self.learning_rate
        logits, moments = self.logits.view(-1), self.moments.view(2, -1)
        adamw_step(logits, moments, found, rate, step, clip)

    def restart(self) -> None:
        """Set the logits, and what the optimiser keeps, to where they start."""
        self.logits.fill_(self.init_logit)
        if self.moments is not None:
            self.moments.zero_()

    @property
    def state(self) -> dict[str, Tensor]:
        """What a step changes, by name: views in the shape of the logits."""
        found = {"logits": self.logits}
        if self.moments is not None:
            found["mean"], found["square"] = self.moments
        return found

    @property
    def is_shared(self) -> bool:
        """Whether every process that learns has all of the logits."""
        return not self._is_entrywise or self.shard.is_whole

    def whole(self, name: str = "logits") -> Tensor:
        """Return one of ``state`` of the whole mask; all processes that keep it must ask."""
        own = self.state[name]
        if self.is_shared:
            return own
        found = torch.empty(self.layout.shape, device=own.device)
        self.shard.own(found).copy_(own)
        self.shard.gather(found)
        return found

    def set_whole(self, whole: Tensor, name: str = "logits") -> None:
        """Set one of ``state`` to that of a whole mask."""
        self.state[name].copy_(self.shard.own(whole) if self._is_entrywise else whole)

    def _write(self, draw: Mask) -> None:
        own = self.shard.own(self.weight)
        if isinstance(self.merged, LinearWeight) and self._is_entrywise:
            write_masked(own, self.merged, draw, self.rescale, self.shard)
            return
        factor = mask_factor(self._whole(draw), self.rescale)
        self.merged.write(own, self.shard.own(self.layout.spread(factor)))

    @property
    def _is_entrywise(self) -> bool:
        return self.layout.shape == self.weight.shape

    def _factor_gradient(
        self, gradient: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor | None, Tensor, Shard]:
        """Return the first three arguments of ``optimizer.logit_gradient``, and the last."""
        if isinstance(self.merged, LinearWeight) and self._is_entrywise:
            return gradient, self.merged.fused, self.shard.own(self.weight.detach()), self.shard
        sample = self._whole(draw)
        # The gradient of a linear weight is the same at any factor.
        is_linear = isinstance(self.merged, LinearWeight)
        factor = sample if is_linear else mask_factor(sample, self.rescale)
        of_factor = self.merged.factor_gradient(gradient, factor, self.layout, self.shard)
        return of_factor, None, sample, Shard(tuple(self.layout.shape))

    def _sample(self, step: int) -> Draw:
        key = noise_key(seed=self.seed, step=step, name=self.name)
        return self._drawn(self.logits.view(-1), key)

    def _drawn(self, entries: Tensor, key: int | None) -> Draw:
        return Draw(entries, key, self._first_entry, self.temperature)

    @property
    def _first_entry(self) -> int:
        return self.shard.first_entry if self._is_entrywise else 0

    def _whole(self, draw: Mask) -> Tensor:
        found = whole_mask(draw, self.logits.numel(), self.logits.device)
        return found.view(self.layout.shape)
