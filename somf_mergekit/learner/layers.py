"""The layers of a model, which go through memory one after another."""

from collections.abc import Sequence
from typing import Any

from torch import nn


class StreamingImpossible(ValueError):
    """The model is no embedding, layers one after another, and head."""


def layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of a model, in their order.

    Raises:
        StreamingImpossible: there is not one list of layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise StreamingImpossible(
            f"{type(model).__name__} has {len(found)} lists of layers, not one"
        )
    return list(found[0])


def layer_of_weights(model: Any, layers: Sequence[nn.Module]) -> dict[int, int]:
    """Return the layer of each weight that is in one, by identity.

    Raises:
        StreamingImpossible: layers share weights, with each other or with what is outside them.
    """
    place: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for weight in layer.parameters():
            if place.setdefault(id(weight), number) != number:
                raise StreamingImpossible(f"layers of {type(model).__name__} share weights")
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside and any(
            id(weight) in place for weight in module.parameters(recurse=False)
        ):
            raise StreamingImpossible(f"layers of {type(model).__name__} share weights with others")
    return place
