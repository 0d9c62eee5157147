"""The model that learns: a transformers model whose weights are the merge under the mask."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RecipeError
from ..granularity import mask_layout, weight_storage
from ..recipe import Settings
from ..sources import LoadedTensor
from .tensors import FixedTensor, MaskedTensor


@dataclass(frozen=True)
class LearningModel:
    """A model in float32 that can hold the base, the plain merge, and the merge under a mask.

    Attributes:
        model: the transformers model.
        masked: its weights with a mask.
        fixed: its weights that the merge changes without a mask.
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
    device: torch.device | str,
    trust_remote_code: bool,
) -> LearningModel:
    """Return the model that learns, its masked weights at the base's values.

    Tensors outside ``masked_names``, and those that no model changed, get no mask.

    Args:
        config: transformers configuration of the merged model.
        loaded: every tensor of the merge.
        settings: of the recipe.
        masked_names: tensors that may get a mask.
        device: where the model learns.
        trust_remote_code: as mergekit's option.

    Raises:
        RecipeError: the merge is no model of the base's architecture, or nothing has changed.
    """
    loaded = list(loaded)
    model = _empty_model(config, loaded, device, trust_remote_code)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    storage = weight_storage(config)
    masked: dict[int, MaskedTensor] = {}
    fixed: dict[int, FixedTensor] = {}
    aliases: dict[str, str] = {}
    filled: set[str] = set()
    for tensor in loaded:
        loaded_as = tensor.name if tensor.name in places else _loaded_name(tensor.name, model)
        if loaded_as not in places and not tensor.changed:
            # Buffers of older checkpoints: the model makes its own, and ignores these.
            continue
        place = _place(places, loaded_as, tensor, model)
        filled.add(loaded_as)
        if id(place) in masked:
            aliases[tensor.name] = masked[id(place)].name
            continue
        with torch.no_grad():
            place.copy_(tensor.base)
        if tensor.weight is None:
            continue
        weight = tensor.weight.to(device)
        base = tensor.base.to(device)
        if not tensor.changed or tensor.name not in masked_names:
            with torch.no_grad():
                merged = weight.merged(torch.ones((), device=base.device))
            if not torch.equal(merged, base.float()):
                fixed[id(place)] = FixedTensor(place, base, merged)
            continue
        values = tensor.parameters
        masked[id(place)] = MaskedTensor(
            name=tensor.name,
            weight=place,
            base=base,
            merged=weight,
            layout=mask_layout(values["granularity"], tensor.name, tuple(base.shape), storage),
            temperature=values["temperature"],
            rescale=values["mask_rescale"],
            seed=settings.seed,
            init_logit=values["init_logit"],
            learning_rate=values["learning_rate"],
        )
    _check_complete(model, filled)
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


def _loaded_name(name: str, model: Any) -> str:
    """Return the name that transformers gives a checkpoint's tensor when it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    for transform in get_model_conversion_mapping(model):
        if isinstance(transform, WeightRenaming):
            name, _ = transform.rename_source_key(name)
    return name


def _place(places: dict[str, Any], loaded_as: str, tensor: LoadedTensor, model: Any) -> Any:
    place = places.get(loaded_as)
    if place is not None and place.shape == tensor.base.shape:
        return place
    found = "has no such weight" if place is None else f"expects {tuple(place.shape)}"
    raise RecipeError(
        f"a mask can't be learned for this merge: {tensor.name} of shape "
        f"{tuple(tensor.base.shape)} is written, but {type(model).__name__} {found}. A "
        "learned mask can still be applied with the parameter `mask`."
    )


def _empty_model(
    config: Any, loaded: list[LoadedTensor], device: torch.device | str, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    for tensor in loaded:
        if tensor.vocabulary_axis is not None:
            config.get_text_config().vocab_size = tensor.base.shape[tensor.vocabulary_axis]
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
    except ValueError as error:
        raise RecipeError(
            f"transformers can't make a causal language model of the merge: {error}"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def _check_complete(model: Any, filled: set[str]) -> None:
    given = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in filled}
    missing = [n for n, p in model.named_parameters() if id(p) not in given]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise RecipeError(
            f"a mask can't be learned for this merge: {type(model).__name__} needs {shown}, which "
            "the merge does not write. A learned mask can still be applied with the parameter "
            "`mask`."
        )
