"""The model that learns: a transformers model whose weights are the merge under the mask."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.errors import RecipeError
from ..common.model_classes import Slice, stored_slices, text_names
from ..common.process_group import ALONE, Processes
from ..fusion.merges import FactoredMerge, LinearMerge, LoadedTensor
from ..fusion.shards import Shard
from ..mask.granularity import Layout, mask_layout, weight_storage
from ..recipe.settings import Settings
from .factored import adapted
from .few_bits import FewBits, in_few_bits
from .parts import Learned, Parts
from .stores import PinnedMemory, Store
from .tensors import FixedTensor, MaskedTensor
from .unfilled_model import unfilled_model


@dataclass(frozen=True)
class Placement:
    """Where the model learns, and in what.

    Attributes:
        device: where the model is.
        autocast: type in which it computes; None for float32. Task vectors are stored in it, and
            the weights that autocast would turn into it for each use.
        store: where what an engine brings layer by layer is stored; None for the device.
        shard_group: the processes that share each tensor, rows of it each.
        is_factored: whether the model has the base's weights throughout, and layers add what
            changes; else all weights are written anew in each pass.
        few_bits: the weights that are in few bits then; None for none.
    """

    device: torch.device | str
    autocast: torch.dtype | None
    store: Store | None = None
    shard_group: Processes = ALONE
    is_factored: bool = False
    few_bits: FewBits | None = None

    def shard(self, tensor: LoadedTensor) -> Shard:
        """Return which rows of a tensor this process has: all that a fusion needs at once."""
        is_divided = isinstance(tensor.merge, LinearMerge | None)
        return Shard(tensor.shape, self.shard_group if is_divided else ALONE)

    def placed(self, tensor: LoadedTensor) -> LoadedTensor:
        """Return a tensor of the merge with this process' part of it where it is stored."""
        shard, merge = self.shard(tensor), tensor.merge

        def moved(whole: Tensor) -> Tensor:
            # A view would hold the other rows too.
            own = whole if shard.is_whole else shard.own(whole).clone()
            return self.store.copy(own) if self.store else own.to(self.device)

        if isinstance(merge, LinearMerge):
            dtype = self.autocast or torch.float32
            merge = LinearMerge(merge.start, tuple(delta.to(dtype) for delta in merge.deltas))
        if self.is_factored:
            # The base's tensor goes into the model, and isn't held beside it.
            return replace(tensor, merge=merge and merge.moved(moved))
        parts = Parts(tensor.base, merge).moved(moved)
        return replace(tensor, base=parts.base, merge=parts.merge)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return room for logits or moments, float32."""
        if self.store:
            return self.store.empty(shape, torch.float32)
        return torch.empty(shape, dtype=torch.float32, device=self.device)


@dataclass(frozen=True)
class LearningModel:
    """A model that can hold the base, the plain merge, and the merge under a mask.

    Attributes:
        model: the transformers model.
        masked: its weights with a mask.
        fixed: its other weights that are in the checkpoint.
        aliases: further checkpoint names of masked weights, with the name of their mask.
    """

    model: Any
    masked: list[MaskedTensor]
    fixed: list[FixedTensor]
    aliases: dict[str, str]


def learning_model(
    config: Any,
    loaded: Iterable[LoadedTensor],
    settings: Settings,
    masked_names: set[str],
    placement: Placement,
    trust_remote_code: bool,
) -> LearningModel:
    """Return the model that learns; what its weights hold is for an engine to write.

    Tensors outside ``masked_names``, and those that no model changed, get no mask.

    Args:
        config: transformers configuration of the merged model.
        loaded: every tensor of the merge.
        settings: of the recipe.
        masked_names: tensors that may get a mask.
        placement: where the model learns.
        trust_remote_code: as mergekit's option.

    Raises:
        RecipeError: the merge isn't a model of the base's architecture, or nothing has changed.
    """
    loaded = [placement.placed(tensor) for tensor in loaded]
    sizes = [t.shape[t.vocabulary_axis] for t in loaded if t.vocabulary_axis is not None]
    model = unfilled_model(
        config,
        sizes[-1] if sizes else None,
        trust_remote_code,
        device=placement.device,
        autocast=placement.autocast,
        is_brought=isinstance(placement.store, PinnedMemory),
        without=placement.few_bits.weights if placement.few_bits else (),
    )
    text = text_names(model)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    slices = stored_slices(model, {tensor.name: tensor.shape for tensor in loaded})
    storage = weight_storage(config)

    def layout(own: LoadedTensor) -> Layout:
        is_of_tokens, granularity = own.vocabulary_axis is not None, own.parameters["granularity"]
        return mask_layout(granularity, own.name, own.shape, storage, is_of_tokens)

    masked: dict[tuple[Any, ...], MaskedTensor] = {}
    fixed: dict[tuple[Any, ...], FixedTensor] = {}
    aliases: dict[str, str] = {}
    filled: set[str] = set()
    for tensor in loaded:
        place = slices.get(tensor.name)
        if place is None and not tensor.changed:
            # Buffers of older checkpoints: the model makes its own, and ignores these.
            continue
        place, parameter = _found(places, place, tensor, model)
        filled.add(place.name)
        key = (parameter, place.steps)
        if key in masked:
            aliases[tensor.name] = masked[key].name
            continue
        if key in fixed:
            continue
        name = place.name.removesuffix(".weight")
        if placement.few_bits and place.name in placement.few_bits.weights:
            layer, precision = model.get_submodule(name), placement.few_bits.precision
            small = in_few_bits(layer, tensor.base, precision, placement.device)
            model.set_submodule(name, small)
        elif placement.is_factored:
            place.of(parameter).copy_(tensor.base)
        if isinstance(tensor.merge, FactoredMerge):
            layer, place = model.get_submodule(name), Slice(place.name)
            parameter = adapted(layer, tensor.merge, layout(tensor))
            tensor = replace(tensor, base=parameter.new_zeros(()).expand(len(parameter)))
        elif placement.is_factored:
            continue
        if not tensor.learned or not tensor.changed or tensor.name not in masked_names:
            parts = Parts(tensor.base, tensor.merge)
            fixed[key] = FixedTensor(parameter, place, placement.shard(tensor), parts)
        else:
            aliases |= dict.fromkeys(tensor.aliases, tensor.name)
            masked[key] = _masked_tensor(
                parameter, place, tensor, settings, placement, layout(tensor)
            )
    _check_complete(model, filled, text)
    if not any(tensor.changed for tensor in loaded):
        raise RecipeError(
            "all task vectors are zero: the fine-tuned models equal the base in every tensor, so "
            "there is nothing to merge and no mask to learn"
        )
    if not masked:
        raise RecipeError(
            "parameters.include and parameters.exclude leave no changed tensor for a mask"
        )
    return LearningModel(model, list(masked.values()), list(fixed.values()), aliases)


def _masked_tensor(
    parameter: Tensor,
    place: Slice,
    tensor: LoadedTensor,
    settings: Settings,
    placement: Placement,
    layout: Layout,
) -> MaskedTensor:
    values, shard = tensor.parameters, placement.shard(tensor)
    own_shape = shard.own_shape if layout.shape == tensor.shape else layout.shape

    def learned() -> Learned:
        has_moments = settings.optimizer == "adamw"
        moments = placement.empty((2, *own_shape)) if has_moments else None
        return Learned(placement.empty(own_shape), moments)

    parts = Parts(tensor.base, tensor.merge, tuple(learned() for _ in tensor.learned))
    masked = MaskedTensor(
        name=tensor.name,
        models=tensor.learned,
        parameter=parameter,
        slice=place,
        shard=shard,
        parts=parts,
        layout=layout,
        temperature=values["temperature"],
        rescale=values["mask_rescale"],
        seed=settings.seed,
        init_logit=values["init_logit"],
        learning_rate=values["learning_rate"],
        is_noisy=settings.mask_noise == "concrete",
        kind=values["mask_kind"],
        given=tensor.starts,
    )
    masked.restart()
    return masked


def _found(
    places: dict[str, Any], place: Slice | None, tensor: LoadedTensor, model: Any
) -> tuple[Slice, Any]:
    """Return where a tensor lies in the model, and in which parameter.

    Raises:
        RecipeError: the model has no place for it, or another shape.
    """
    expected = tuple(place.of(places[place.name]).shape) if place else None
    if place and expected == tensor.shape:
        return place, places[place.name]
    raise RecipeError(
        f"a mask can't be learned for this merge: {tensor.name} of shape {tensor.shape} is "
        f"written, but {type(model).__name__} "
        f"{f'expects {expected}' if expected else 'has no such weight'}. A learned mask can still "
        "be applied with the parameter `mask`."
    )


def _check_complete(model: Any, filled: set[str], text: set[str]) -> None:
    given = {p for n, p in model.named_parameters(remove_duplicate=False) if n in filled}
    missing = [n for n, p in model.named_parameters() if n in text and p not in given]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise RecipeError(
            f"a mask can't be learned for this merge: {type(model).__name__} needs {shown}, which "
            "the merge does not write. A learned mask can still be applied with the parameter "
            "`mask`."
        )
