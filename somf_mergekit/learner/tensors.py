"""One weight under its masks: the two steps of learning."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..common.model_classes import Slice
from ..fusion.merges import LinearMerge
from ..fusion.shards import Shard
from ..mask.granularity import Layout
from ..mask.masking import MERGE_STEP, MaskSampler, mask_factor
from ..mask.noise import noise_key
from .optimizer import FactorGradient, LogitGradient, adamw_step, logit_gradient, signsgd_step
from .parts import Content, Parts, State
from .triton_check import kernels_for


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
            parts.merge.write(own)


@dataclass(eq=False)
class MaskedTensor(FixedTensor):
    """A weight of the model that learns its mask, or one for each of several models.

    Attributes:
        name: of the tensor in the merged checkpoint.
        models: those of each mask.
        layout: how a mask's entries lie on the whole weight.
        temperature: of the concrete samples.
        is_noisy: whether learning draws them; else it takes the expected mask, sigmoid(x), in
            their place.
        rescale: see ``masking.mask_scale``.
        seed: of the noise.
        init_logit: where the logits start.
        given: for each mask what gives the logits, in the layout's shape, that it starts from in
            their place, or None; none where no mask does.
        learning_rate: at the schedule's peak.
        kind: of the mask that the merge uses, one of ``masking.MASK_KINDS``.
        gradient_square: squared norm of the gradient of the latest update, of the logits that this
            process has; None where there was none.
    """

    name: str
    models: tuple[tuple[Hashable, ...], ...]
    layout: Layout
    temperature: float
    rescale: str
    seed: int
    init_logit: float
    learning_rate: float
    is_noisy: bool = True
    kind: str = "soft"
    given: Sequence[Callable[[], Tensor] | None] = ()
    gradient_square: Tensor | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self.parts.masks[0].logits.device

    @property
    def state(self) -> dict[str, Tensor]:
        """What a step changes, by name: views in the shape of the logits."""
        found: dict[str, Tensor] = {}
        for number, mask in enumerate(self.parts.masks):
            own = {"logits": mask.logits}
            if mask.moments is not None:
                own["mean"], own["square"] = mask.moments
            found |= {_of_mask(name, number): tensor for name, tensor in own.items()}
        return found

    @property
    def is_entrywise(self) -> bool:
        """Whether a mask has an entry for each of the weight's."""
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
        rate = multiplier * self.learning_rate
        kernels = kernels_for(gradient.device)
        squares = []
        for found in self._factor_gradients(gradient, step, parts):
            if kernels:
                squares.append(kernels.update_logits(found, rate))
            else:
                squares.append(signsgd_step(found.sampler.logits, logit_gradient(found), rate))
        self.gradient_square = torch.stack(squares).sum()

    @torch.no_grad()
    def logit_gradients(self, gradient: Tensor, step: int, parts: Parts) -> list[LogitGradient]:
        """Return the logits' gradients; arguments, and what is lost, are those of ``update``.

        There is one for each factor of each mask.
        """
        found = [logit_gradient(own) for own in self._factor_gradients(gradient, step, parts)]
        self.gradient_square = torch.stack([own.square() for own in found]).sum()
        return found

    @torch.no_grad()
    def adamw_step(
        self, found: list[LogitGradient], step: int, multiplier: float, clip: float, parts: Parts
    ) -> None:
        """Take a step of AdamW; arguments as of ``update`` and ``optimizer.adamw_step``.

        Args:
            found: what ``logit_gradients`` gave.
        """
        rate, gradients = multiplier * self.learning_rate, iter(found)
        for mask in parts.masks:
            logits, moments = mask.tensors
            for part in self._places(logits):
                own = moments.view(2, -1)[:, part]
                adamw_step(logits.view(-1)[part], own, next(gradients), rate, step, clip)

    def restart(self) -> None:
        """Set the logits, and the optimiser's moments, to where they start."""
        for number, mask in enumerate(self.parts.masks):
            self.set_whole(self._start(number), _of_mask("logits", number))
            if mask.moments is not None:
                mask.moments.zero_()

    def wholes(self) -> Iterator[tuple[tuple[Hashable, ...], Tensor]]:
        """Yield the models of each mask with its logits; all processes of the group must ask."""
        for number, models in enumerate(self.models):
            yield models, self.whole(_of_mask("logits", number))

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

    def _start(self, number: int) -> Tensor:
        """Return the logits from which a mask starts, in the layout's shape or a view of it."""
        given = self.given[number] if self.given else None
        start = torch.tensor(self.init_logit) if given is None else given()
        return start.to(self.device).expand(self.layout.shape)

    def _write(self, own: Tensor, state: State, parts: Parts) -> None:
        assert parts.merge is not None
        if state.content in (Content.BASE, Content.UNMASKED):
            super()._write(own, state, parts)
            return
        samplers = [self._sampler(state, parts, number) for number in range(len(parts.masks))]
        if not (self.is_entrywise and isinstance(parts.merge, LinearMerge)):
            factors = []
            for sampler in samplers:
                factor = mask_factor(self._mask(sampler), self.rescale, self.layout)
                factors.append([self.shard.own(one) for one in self.layout.expand_factors(factor)])
            parts.merge.write(own, factors)
            return
        # The kernels write one mask: the sum over several would be rounded after each.
        kernels = kernels_for(own.device) if samplers[0].kind is None else None
        if kernels and len(samplers) == 1:
            kernels.write_sampled(parts.merge, own, samplers[0], self.rescale, self.shard)
        else:
            parts.merge.write_sampled(own, samplers, self.rescale, self.shard)

    def _sampler(self, state: State, parts: Parts, number: int) -> MaskSampler:
        """Return a mask of a state: of the rows that this process has if it is entrywise."""
        logits, step, name, kind = parts.masks[number].logits.view(-1), state.step, self.name, None
        if state.content is Content.UNTRAINED_SAMPLE:
            start = self._start(number)
            own = self.shard.own(start) if self.is_entrywise else start
            logits, name = own.reshape(-1).to(logits.device), f"untrained/{name}"
        elif state.content is Content.MERGED:
            step, kind = MERGE_STEP, self.kind
        is_drawn = kind is not None or (self.is_noisy and state.content is not Content.SOFT)
        # Masks of several models share their noise, as they do when they are merged.
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

    def _places(self, logits: Tensor) -> list[slice]:
        """Return where each factor of a mask has its logits, of those that this process has."""
        if self.layout.factors:
            return [part for part, _ in self.layout.parts()]
        return [slice(0, logits.numel())]

    def _factor_gradients(
        self, gradient: Tensor, step: int, parts: Parts
    ) -> Iterator[FactorGradient]:
        """Yield the gradient for each factor of each mask; each may be written over."""
        merge, state = parts.merge, State(Content.SAMPLE, step)
        assert merge is not None
        # The samples are drawn again rather than stored: functions of logits, seed and step.
        samplers = [self._sampler(state, parts, number) for number in range(len(parts.masks))]
        if isinstance(merge, LinearMerge) and self.is_entrywise:
            last = len(samplers) - 1
            for number, (sampler, delta) in enumerate(zip(samplers, merge.deltas, strict=True)):
                own = gradient if number == last else gradient.clone()
                room = self.shard.own(self.weight)
                yield FactorGradient(own, delta, sampler, self.rescale, self.shard, room)
            return
        masks = [self._mask(sampler) for sampler in samplers]
        factors = [mask_factor(mask, self.rescale, self.layout) for mask in masks]
        of_factors = merge.factor_gradients(gradient, factors, self.layout, self.shard)
        for sampler, mask, of_factor in zip(samplers, masks, of_factors, strict=True):
            for part in self._places(sampler.logits):
                # Of the mask, only its memory is used.
                own, room = of_factor.view(-1)[part], mask.view(-1)[part]
                sample = replace(sampler, logits=sampler.logits[part], first=part.start)
                whole = Shard((len(own),))
                yield FactorGradient(own, None, sample, self.rescale, whole, room)


def set_masks(tensors: Iterable[MaskedTensor], others: Iterable[MaskedTensor]) -> None:
    """Set what is learned of tensors to that of others of the same names.

    All processes that learn must ask.
    """
    by_name = {other.name: other for other in others}
    for tensor in tensors:
        for name in tensor.state:
            tensor.set_whole(by_name[tensor.name].whole(name), name)


def _of_mask(name: str, number: int) -> str:
    """Return the name of what a mask has, that of the first as where there is one mask."""
    return f"{name} of mask {number}" if number else name
