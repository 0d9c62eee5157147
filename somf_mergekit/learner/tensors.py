"""One weight under its mask: what it is made of, and the two steps of learning."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from ..common.model_classes import Slice
from ..fusion.merges import LinearMerge, Merge
from ..fusion.shards import Shard
from ..mask.granularity import Layout
from ..mask.masking import MERGE_STEP, MaskSampler, mask_factor
from ..mask.noise import noise_key
from .optimizer import FactorGradient, LogitGradient, adamw_step, logit_gradient, signsgd_step
from .triton_check import kernels_for


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


@dataclass(frozen=True)
class Parts:
    """What a weight is made of: the rows that this process has, or a copy on another device.

    Attributes:
        base: the base model's tensor.
        merge: the merged weight as a function of the mask's factor; None where it is the base's.
        logits: of the mask, float32, one per entry, learned in place; None without a mask.
        moments: AdamW's means of earlier gradients, (2, *shape of the logits), float32; None under
            signSGD, which has none.
    """

    base: Tensor
    merge: Merge | None
    logits: Tensor | None = None
    moments: Tensor | None = None

    @property
    def learned(self) -> list[Tensor]:
        """What a step changes."""
        return [own for own in (self.logits, self.moments) if own is not None]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Parts":
        """Return the same with each tensor put where ``move`` puts it."""
        base = move(self.base)
        # A merge has the base too, most often.
        merge = self.merge and self.merge.moved(lambda t: base if t is self.base else move(t))
        logits, moments = (None if t is None else move(t) for t in (self.logits, self.moments))
        return Parts(base, merge, logits, moments)


@dataclass(eq=False)
class FixedTensor:
    """A weight of the model that learns; this one has no mask.

    Attributes:
        parameter: of the model; its values are written here.
        slice: which part of the parameter the weight is: that of one expert, where the model joins
            those that a checkpoint has apart.
        shard: the rows that this process has of what follows.
        parts: what the weight is made of.
    """

    parameter: Tensor
    slice: Slice
    shard: Shard
    parts: Parts

    @property
    def weight(self) -> Tensor:
        """The weight, a view of the parameter."""
        return self.slice.of(self.parameter.detach())

    @torch.no_grad()
    def write(self, state: State, parts: Parts | None = None) -> None:
        """Set the weight to what ``state`` says.

        Args:
            state: what the model's weights are.
            parts: what to compute with; the tensor's own where not given.
        """
        self._write(self.shard.own(self.weight), state, parts or self.parts)
        self.shard.gather(self.weight)

    def _write(self, own: Tensor, state: State, parts: Parts) -> None:
        if parts.merge is None or state.content is Content.BASE:
            own.copy_(parts.base)
        else:
            parts.merge.write(own, torch.ones((), device=own.device))


@dataclass(eq=False)
class MaskedTensor(FixedTensor):
    """A weight of the model that learns its mask.

    Attributes:
        name: of the tensor in the merged checkpoint.
        layout: how the mask's entries lie on the whole weight.
        temperature: of the concrete samples.
        is_noisy: whether learning draws them; else it takes the expected mask, sigmoid(x), in
            their place.
        rescale: see ``masking.mask_scale``.
        seed: of the noise.
        init_logit: where the logits start.
        learning_rate: at the schedule's peak.
        kind: of the mask that the merge uses, one of ``masking.MASK_KINDS``.
        gradient_square: squared norm of the gradient of the latest update, of the logits that this
            process has; None where there was none.
    """

    name: str
    layout: Layout
    temperature: float
    rescale: str
    seed: int
    init_logit: float
    learning_rate: float
    is_noisy: bool = True
    kind: str = "soft"
    gradient_square: Tensor | None = field(default=None, init=False)

    @property
    def logits(self) -> Tensor:
        """Of the mask: those that this process has."""
        assert self.parts.logits is not None
        return self.parts.logits

    @property
    def state(self) -> dict[str, Tensor]:
        """What a step changes, by name: views in the shape of the logits."""
        found = {"logits": self.logits}
        if self.parts.moments is not None:
            found["mean"], found["square"] = self.parts.moments
        return found

    @property
    def is_entrywise(self) -> bool:
        """Whether the mask has an entry for each of the weight's."""
        return self.layout.shape == self.shard.shape

    @property
    def is_shared(self) -> bool:
        """Whether every process that learns has all of the logits."""
        return not self.is_entrywise or self.shard.is_whole

    @torch.no_grad()
    def update(self, gradient: Tensor, step: int, multiplier: float, parts: Parts) -> None:
        """Take a step of signSGD on the logits from the weight's gradient.

        The weight's own values and the gradient's are lost: the next step makes them anew.

        Args:
            gradient: dL/dW of the rows that this process has, complete.
            step: whose sample the weight was written with.
            multiplier: of the learning rate, from 0 to 1.
            parts: what to compute with.
        """
        found = self._factor_gradient(gradient, step, parts)
        rate = multiplier * self.learning_rate
        kernels = kernels_for(gradient.device)
        if kernels:
            self.gradient_square = kernels.update_logits(found, rate)
        else:
            self.gradient_square = signsgd_step(found.sampler.logits, logit_gradient(found), rate)

    @torch.no_grad()
    def logit_gradient(self, gradient: Tensor, step: int, parts: Parts) -> LogitGradient:
        """Return the logits' gradient; arguments, and what is lost, are those of ``update``."""
        found = logit_gradient(self._factor_gradient(gradient, step, parts))
        self.gradient_square = found.square()
        return found

    @torch.no_grad()
    def adamw_step(
        self, found: LogitGradient, step: int, multiplier: float, clip: float, parts: Parts
    ) -> None:
        """Take a step of AdamW; arguments as of ``update`` and ``optimizer.adamw_step``."""
        logits, moments = parts.learned
        rate = multiplier * self.learning_rate
        adamw_step(logits.view(-1), moments.view(2, -1), found, rate, step, clip)

    def restart(self) -> None:
        """Set the logits, and the optimiser's moments, to where they start."""
        self.logits.fill_(self.init_logit)
        if self.parts.moments is not None:
            self.parts.moments.zero_()

    def whole(self, name: str = "logits") -> Tensor:
        """Return one of ``state`` of the whole mask; all processes of its shard group must ask."""
        own = self.state[name]
        if self.is_shared:
            return own
        found = torch.empty(self.layout.shape, device=own.device)
        self.shard.own(found).copy_(own)
        self.shard.gather(found)
        return found

    def set_whole(self, whole: Tensor, name: str = "logits") -> None:
        """Set one of ``state`` to that of a whole mask."""
        self.state[name].copy_(self.shard.own(whole) if self.is_entrywise else whole)

    def _write(self, own: Tensor, state: State, parts: Parts) -> None:
        assert parts.merge is not None
        if state.content in (Content.BASE, Content.UNMASKED):
            super()._write(own, state, parts)
            return
        sampler = self._sampler(state, parts)
        if not (self.is_entrywise and isinstance(parts.merge, LinearMerge)):
            factor = mask_factor(self._mask(sampler), self.rescale)
            parts.merge.write(own, self.shard.own(self.layout.expand(factor)))
            return
        kernels = kernels_for(own.device) if sampler.kind is None else None
        write = kernels.write_sampled if kernels else LinearMerge.write_sampled
        write(parts.merge, own, sampler, self.rescale, self.shard)

    def _sampler(self, state: State, parts: Parts) -> MaskSampler:
        """Return the mask of a state: of the rows that this process has if it is entrywise."""
        assert parts.logits is not None
        logits, step, name, kind = parts.logits.view(-1), state.step, self.name, None
        if state.content is Content.UNTRAINED_SAMPLE:
            start = torch.tensor(self.init_logit, device=logits.device)
            logits, name = start.expand(len(logits)), f"untrained/{name}"
        elif state.content is Content.MERGED:
            step, kind = MERGE_STEP, self.kind
        is_drawn = kind is not None or (self.is_noisy and state.content is not Content.SOFT)
        key = noise_key(seed=self.seed, step=step, name=name) if is_drawn else None
        # Without noise, m = sigmoid(x): its slope is that of temperature 1.
        temperature = self.temperature if is_drawn else 1.0
        first = self.shard.first_entry if self.is_entrywise else 0
        return MaskSampler(logits, temperature, key, first, kind)

    def _mask(self, sampler: MaskSampler) -> Tensor:
        """Return a mask that is drawn whole: it has few entries, or its fusion isn't linear."""
        kernels = kernels_for(sampler.logits.device) if sampler.kind is None else None
        found = kernels.whole_mask(sampler) if kernels else sampler.whole()
        return found.view(self.layout.shape)

    def _factor_gradient(self, gradient: Tensor, step: int, parts: Parts) -> FactorGradient:
        assert parts.merge is not None
        # The sample is drawn again rather than stored: a function of logits, seed and step.
        sampler = self._sampler(State(Content.SAMPLE, step), parts)
        if isinstance(parts.merge, LinearMerge) and self.is_entrywise:
            room = self.shard.own(self.weight)
            return FactorGradient(
                gradient, parts.merge.delta, sampler, self.rescale, self.shard, room
            )
        sample = self._mask(sampler)
        factor = mask_factor(sample, self.rescale)
        of_factor = parts.merge.factor_gradient(gradient, factor, self.layout, self.shard)
        whole = Shard(tuple(self.layout.shape))
        return FactorGradient(of_factor, None, sampler, self.rescale, whole, sample)
