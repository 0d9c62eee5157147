"""Layers that add what adapters change to what the base computes: no weight is written."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ..common.model_classes import text_decoder
from ..fusion.merges import FactoredMerge
from ..mask.granularity import Layout


def adapted(layer: torch.nn.Linear, merge: FactoredMerge, layout: Layout) -> torch.nn.Parameter:
    """Let a layer compute y -> W0 y + up (down y); return the parameter that holds both.

    A mask costs two small products a pass, and the parameter's gradient the adapters' rank.

    Args:
        layer: with the base's weight, W0, which gets no gradient.
        merge: sets the parameter, see ``FactoredMerge.write``; float32.
        layout: of its masks.
    """
    # Where masks have entries for outputs alone, no inputs need be kept for a backward pass.
    is_down_learned = any(part.expanded_shape[0] == 1 for _, part in layout.parts())
    numbers = torch.nn.Parameter(
        torch.zeros(merge.size, device=layer.weight.device), requires_grad=False
    )

    def added(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = merge.parts(numbers)
        if not is_down_learned:
            down = down.detach()
        return output + linear(linear(inputs[0], down), up)

    layer.register_forward_hook(added)
    return numbers


def recompute_layers(model: Any) -> None:
    """Let backward passes compute each layer again, so that one layer's activations exist at once.

    Args:
        model: of transformers, whose layers keep nothing from one call to the next.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in text_decoder(model).modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
