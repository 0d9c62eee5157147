"""What a recipe says of masks: which are given, which are learned, and from what."""

from collections.abc import Iterator
from typing import Any

from .blocks import model_blocks


def mask_problems(config: Any) -> Iterator[str]:
    """Yield what of masks and safety data a recipe says too much of, or too little.

    Args:
        config: a mergekit MergeConfiguration.
    """
    top = config.parameters or {}
    models: dict[Any, dict[str, Any]] = {}
    for place, items, base in model_blocks(config):
        for number, item in enumerate(items):
            own = item.parameters or {}
            if item.model == base:
                for name in ("mask", "learn", "mask_transfer"):
                    if name in own:
                        yield (
                            f"{place}[{number}].parameters.{name}: {base} is base_model, which has "
                            "no task vector; say it of a fine-tuned model"
                        )
                continue
            models.setdefault(item.model, {}).update(own)
    has_data = "safety_dataset" in top
    given = [model for model, own in models.items() if "mask" in own or "mask" in top]
    asked = [model for model, own in models.items() if own.get("learn")]
    if not has_data and asked:
        yield (
            "parameters.safety_dataset is missing: name preference pairs to learn the masks on of "
            f"{', '.join(map(str, asked))}, or leave `learn` out"
        )
    elif not has_data and not given:
        yield (
            "parameters.safety_dataset is missing: name preference pairs to learn the mask on, or "
            "a learned mask with parameters.mask"
        )
    elif has_data and "mask" in top and not asked:
        yield (
            "parameters.mask and parameters.safety_dataset are both given: a mask is already "
            "learned, so remove one of them, or say `learn: true` of a model to learn its mask on"
        )
    elif (
        has_data
        and models
        and not asked
        and all(model in given or own.get("learn") is False for model, own in models.items())
    ):
        yield (
            "parameters.safety_dataset: no model's mask is learned, so remove it, or say `learn: "
            "true` of a model"
        )
