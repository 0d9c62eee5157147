"""The model that learns: a transformers model whose weights are the merge under the mask."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import RecipeError
from ..recipe import Settings
from ..sources import LoadedTensor
from .tensors import MaskedTensor


def learning_model(
    config: Any,
    loaded: Iterable[LoadedTensor],
    settings: Settings,
    masked_names: set[str],
    device: torch.device | str,
    trust_remote_code: bool,
) -> tuple[Any, list[MaskedTensor], dict[str, str]]:
    """Return a float32 model with the merge's weights, its masked tensors, and tied names.

    Tensors outside ``masked_names`` get their plain fusion; tensors that no model changed stay
    the base's and get no mask.

    Args:
        config: transformers configuration of the merged model.
        loaded: every tensor of the merge.
        settings: of the recipe.
        masked_names: tensors that may get a mask.
        device: where the model learns.
        trust_remote_code: as mergekit's option.

    Returns:
        The model; one MaskedTensor per mask; further checkpoint names of masked tensors, with the
        name under which the mask is learned.

    Raises:
        RecipeError: the merge is no model of the base's architecture, or nothing has changed.
    """
    model: Any = None
    tensors: dict[int, MaskedTensor] = {}
    aliases: dict[str, str] = {}
    filled: set[str] = set()
    changed = False
    loaded = list(loaded)
    model = _empty_model(config, loaded, device, trust_remote_code)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for tensor in loaded:
        place = places.get(tensor.name)
        if place is None or place.shape != tensor.base.shape:
            found = "has no such weight" if place is None else f"expects {tuple(place.shape)}"
            raise RecipeError(
                f"a mask can't be learned for this merge: {tensor.name} of shape "
                f"{tuple(tensor.base.shape)} is written, but {type(model).__name__} {found}. A "
                "learned mask can still be applied with the parameter `mask`."
            )
        filled.add(tensor.name)
        changed = changed or tensor.fused is not None
        if id(place) in tensors:
            aliases[tensor.name] = tensors[id(place)].name
            continue
        with torch.no_grad():
            place.copy_(tensor.base)
        if tensor.fused is None:
            continue
        if tensor.name not in masked_names:
            with torch.no_grad():
                place.add_(tensor.fused.to(place.device))
            continue
        tensors[id(place)] = MaskedTensor(
            name=tensor.name,
            weight=place,
            base=tensor.base.to(device),
            fused=tensor.fused.to(device),
            temperature=tensor.parameters["temperature"],
            rescale=tensor.parameters["mask_rescale"],
            seed=settings.seed,
            init_logit=settings.init_logit,
        )
    _check_complete(model, filled)
    if not changed:
        raise RecipeError(
            "all task vectors are zero: the fine-tuned models equal the base in every tensor, so "
            "there is nothing to merge and no mask to learn"
        )
    if not tensors:
        raise RecipeError(
            "parameters.include and parameters.exclude leave no changed tensor for a mask"
        )
    return model, list(tensors.values()), aliases


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
