"""What decides a learned mask, and what is told with it."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .inputs import SafetyData
from .learner.tensors import MaskedTensor
from .sources import PlannedMerge, content_fingerprint

# Settings that choose how a learned mask is used, not which mask is learned.
_USE_ONLY = ("mask", "mask_kind")
_CURVE_STEPS = 10


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
        "settings": {k: v for k, v in settings.items() if not k.startswith("safety_")},
        "parameters of the tensors": _digest(resolved),
        "dtype": planned.config.dtype or "as stored",
        "versions": _versions(),
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
        "settings": settings.model_dump(),
        "seed": settings.seed,
        "steps": len(history),
        "tensors": len(tensors),
        "entries": sum(tensor.logits.numel() for tensor in tensors),
        "training": {
            "first_steps": _curve_mean(history[:_CURVE_STEPS]),
            "last_steps": _curve_mean(history[-_CURVE_STEPS:]),
        },
        "versions": _versions(),
        "fingerprint": fingerprint,
    }


def _curve_mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    return {key: sum(r[key] for r in rows) / len(rows) for key in ("loss", "accuracy", "margin")}


def _versions() -> dict[str, str]:
    names = ("somf-mergekit", "mergekit", "torch", "transformers")
    return {name: version(name) for name in names}


def differences(told: dict[str, Any], fingerprint: dict[str, Any]) -> list[str]:
    """Return in what a mask told with ``told`` differs from one with ``fingerprint``."""
    before = told.get("fingerprint", {})
    return [key for key, value in fingerprint.items() if before.get(key) != value]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
