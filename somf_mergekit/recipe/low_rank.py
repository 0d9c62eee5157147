"""Adapters whose changes can stay factored: read as PEFT scales them, never multiplied out."""

from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from ..common.errors import few, first_line
from ..fusion.merges import LowRank
from .adapters import loaded_adapter

# Ways to start an adapter that leave the base as it is; others change it too.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class NotFactoredError(ValueError):
    """Why the masks of a merge can't be learned with its adapters factored, in words."""


def low_rank_changes(model: ModelReference, options: MergeOptions) -> dict[str, LowRank]:
    """Return what an adapter adds to weights of linear layers, float32, by the weight's name.

    Args:
        model: with an adapter.
        options: mergekit's.

    Raises:
        NotFactoredError: it changes something else, or in another way.
    """
    import peft

    path, revision = model.lora.path, model.lora.revision
    try:
        config: Any = peft.PeftConfig.from_pretrained(path, revision=revision)
        given, adapted, _ = loaded_adapter(model, config, options)
    except Exception as error:  # as many as there are kinds of adapters
        raise NotFactoredError(f"{model.lora} can't be read: {first_line(error)}") from error
    others = [n for n in given if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    if type(config) is not peft.LoraConfig or others:
        what = f"has {few(others)}" if others else f"is of the type {config.peft_type.value}"
        raise NotFactoredError(f"{model.lora} {what}: it is more than the A and B of a LoRA")
    if config.init_lora_weights not in _PLAIN_STARTS or config.layer_replication:
        raise NotFactoredError(f"{model.lora} changes the base beside what it adds to it")
    changes = {}
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        # The model itself has no memory.
        matrices = [given.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB"]
        if any(matrix is None for matrix in matrices) or not _is_plain(module):
            raise NotFactoredError(f"{model.lora} changes {name}, which isn't a plain linear layer")
        down, up = (matrix.float() for matrix in matrices)
        if not down.isfinite().all() or not up.isfinite().all():
            raise NotFactoredError(f"{model.lora} has NaN or infinite entries in {name}")
        if down.any() and up.any():
            changes[f"{name}.weight"] = LowRank(down, up * module.scaling["default"])
    return changes


def _is_plain(layer: Any) -> bool:
    """Return whether an adapter adds scaling B A to the weight of a linear layer."""
    import peft
    import torch

    is_linear = type(layer) is peft.tuners.lora.Linear and type(layer.base_layer) is torch.nn.Linear
    return is_linear and not layer.lora_variant and not layer.fan_in_fan_out
