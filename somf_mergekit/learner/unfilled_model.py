"""The model that learns, before its weights are set: each where it learns, in the right type."""

import copy
from collections.abc import Collection
from typing import Any

import torch

from ..common.errors import RecipeError
from ..common.model_classes import auto_class, text_names
from .few_bits import take_away


def unfilled_model(
    config: Any,
    vocabulary: int | None,
    trust_remote_code: bool,
    *,
    device: torch.device | str,
    autocast: torch.dtype | None,
    is_brought: bool,
    without: Collection[str],
) -> Any:
    """Return a transformers model whose weights hold nothing yet.

    Args:
        config: of the merged model.
        vocabulary: how many tokens it has; None for as many as the configuration says.
        trust_remote_code: as mergekit's option.
        device: where it learns.
        autocast: type in which it computes; None for float32.
        is_brought: whether no weight has memory until an engine gives it some.
        without: names of weights of linear layers that get no memory: they are on the meta device.

    Raises:
        RecipeError: transformers can't make it.
    """
    model = _made(config, vocabulary, trust_remote_code)
    text = text_names(model)
    for name, weight in model.named_parameters():
        if name not in text:
            # What sees and hears takes no part in a text.
            weight.data = weight.data.new_empty(0)
    if autocast:
        _set_layers_type(model, autocast)
    take_away(model, without)
    _move(model, device, is_brought)
    return model


def _made(config: Any, vocabulary: int | None, trust_remote_code: bool) -> Any:
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    if vocabulary is not None:
        config.get_text_config().vocab_size = vocabulary
    try:
        with no_init_weights():
            model = auto_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
    except ValueError as error:
        raise RecipeError(
            f"transformers can't make a model that writes text of the merge: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def _move(model: Any, device: torch.device | str, is_brought: bool) -> None:
    """Put a model, whose weights hold nothing yet, where it learns."""
    for weight in model.parameters():
        if not weight.is_meta:
            weight.data = torch.empty_like(weight.data, device=device)
            if is_brought:
                weight.untyped_storage().resize_(0)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _set_layers_type(model: Any, dtype: torch.dtype) -> None:
    """Give the weights of linear layers ``dtype``: what they held is lost.

    Others, such as embeddings, norms and routers of experts, compute in float32 under autocast too.
    """
    from transformers.pytorch_utils import Conv1D

    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, (torch.nn.Linear, Conv1D))]
    elsewhere = {
        weight
        for module in set(modules) - set(layers)
        for weight in module.parameters(recurse=False)
    }
    for layer in layers:
        if layer.weight not in elsewhere:
            layer.weight.data = torch.empty_like(layer.weight.data, dtype=dtype)
