"""What decides a learned mask, and what is told with it."""

import hashlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from .inputs import SafetyData
from .learner.tensors import MaskedTensor
from .masks import MaskSet
from .method import MASK_TENSOR
from .plan import PlannedMerge
from .sources import content_fingerprint

# Settings that choose how a learned mask is used, not which mask is learned.
_USE_ONLY = (
    "mask",
    "mask_kind",
    MASK_TENSOR,
    *(f"{what}_eval" for what in ("safety", "harmless", "pairs", "skill")),
)
# Settings that only say where the data is, or stand for others: what decides a mask is what is read
# there, and what they set.
_STAND_INS = (
    "preset",
    *(f"safety_{what}" for what in ("dataset", "split", "config", "samples")),
    *(f"utility_{what}" for what in ("dataset", "split", "config", "samples")),
)
_CURVE_STEPS = 10
_CURVES = ("loss", "accuracy", "margin", "utility")


def learning_fingerprint(planned: PlannedMerge, data: SafetyData) -> dict[str, Any]:
    """Return everything that decides a learned mask, as JSON."""
    settings = planned.settings.model_dump(exclude=set(_USE_ONLY))
    resolved = []
    for weight, task in planned.tensors:
        shared = {k: v for k, v in task.parameters.items() if k not in _USE_ONLY and v is not None}
        per_model = [
            sorted((k, v) for k, v in task.input_parameters.get(model, {}).items() if v is not None)
            for model in task.model_order
        ]
        resolved.append([weight.name, sorted(shared.items(), key=str), per_model])
    return {
        "models": [content_fingerprint(model) for model in planned.models],
        "data": _digest([[p.prompt, p.chosen, p.rejected] for p in data.pairs]),
        "utility data": _digest([[e.prompt, e.answer] for e in data.utility]),
        "settings": {k: v for k, v in settings.items() if k not in _STAND_INS},
        "parameters of the tensors": _digest(resolved),
        "dtype": planned.config.dtype or "as stored",
        "versions": versions(),
    }


def provenance(
    planned: PlannedMerge,
    data: SafetyData,
    fingerprint: dict[str, Any],
    history: Sequence[dict[str, Any]],
    tensors: Sequence[MaskedTensor],
) -> dict[str, Any]:
    """Return what is told with a mask, as JSON: no text of the data is in it."""
    settings = planned.settings
    return {
        "recipe": planned.recipe,
        "base_model": str(planned.base_model),
        "models": dict(zip(map(str, planned.models), fingerprint["models"], strict=True)),
        "dataset": {
            "source": settings.safety_dataset,
            "split": settings.safety_split,
            "config": settings.safety_config,
            "pairs": len(data.pairs),
            "left_out": data.dropped,
            "fingerprint": fingerprint["data"],
        },
        "utility_dataset": {
            "source": settings.utility_dataset,
            "examples": len(data.utility),
            "fingerprint": fingerprint["utility data"],
        },
        "settings": told_settings(planned),
        "seed": settings.seed,
        "steps": len(history),
        "tensors": len(tensors),
        "entries": sum(math.prod(tensor.layout.shape) for tensor in tensors),
        "training": {
            "first_steps": _curve_mean(history[:_CURVE_STEPS]),
            "last_steps": _curve_mean(history[-_CURVE_STEPS:]),
        },
        "versions": versions(),
        "fingerprint": fingerprint,
    }


def provenance_of_use(planned: PlannedMerge, masks: MaskSet) -> dict[str, Any]:
    """Return what is told with a mask that another recipe learned, as JSON."""
    settings = planned.settings
    return {
        "recipe": planned.recipe,
        "base_model": str(planned.base_model),
        "models": [str(model) for model in planned.models],
        "settings": told_settings(planned),
        "mask": settings.mask,
        "origin": masks.provenance,
        "versions": versions(),
    }


def told_settings(planned: PlannedMerge) -> dict[str, Any]:
    """Return all settings; those that differ between tensors as the recipe says them."""
    told = planned.settings.model_dump()
    content = yaml.safe_load(planned.config.to_yaml())["parameters"]
    varied = {k: v for k, v in content.items() if k in told and isinstance(v, (dict, list))}
    return told | varied


def _curve_mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    found = {key: [row[key] for row in rows if row[key] is not None] for key in _CURVES}
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def versions() -> dict[str, str]:
    """Return the versions of what a mask and a merge depend on."""
    names = ("somf-mergekit", "mergekit", "torch", "transformers")
    return {name: version(name) for name in names}


def differences(told: dict[str, Any], fingerprint: dict[str, Any]) -> list[str]:
    """Return in what a mask told with ``told`` differs from one with ``fingerprint``."""
    before = told.get("fingerprint", {})
    return [key for key, value in fingerprint.items() if before.get(key) != value]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
