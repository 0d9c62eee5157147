"""What decides a learned mask, and what is recorded with it."""

import json
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mergekit.io.tasks import LoaderCache

from ..common.digests import file_digest, json_digest
from ..common.requirements import versions
from ..data.held_out import KEY, HeldOut
from ..learner.tensors import MaskedTensor
from ..mask.published import pinned_id
from ..recipe.blocks import plain
from ..recipe.settings import INTERNAL, NEVER
from .data_fit import cut_counts
from .given_masks import Given
from .learning_data import SafetyData
from .plan import PlannedMerge, gather_task
from .weight_files import content_fingerprint

# Settings that choose how a learned mask is used, not which mask is learned.
_USE_ONLY = (
    "mask",
    "learn",
    "mask_transfer",
    "mask_kind",
    *INTERNAL,
    *(f"{what}_eval" for what in ("safety", "harmless", "pairs", "skill")),
)
# Settings that only say where the data is, or stand for others: what decides a mask is what is read
# there, and what they set.
_STAND_INS = (
    "preset",
    "chat_template_kwargs",
    *(f"safety_{what}" for what in ("dataset", "split", "config", "samples")),
    *(f"utility_{what}" for what in ("dataset", "split", "config", "samples")),
)
# What a configuration says of the file that it was read from.
_CONFIGURATION_NOTES = ("_name_or_path", "transformers_version")
# In the fingerprint: what the chat template wrote as today's date.
DATE = "date in the chat template"
# In a mask's provenance: the looks at it while it was learned.
VALIDATION = "validation"
_CURVE_STEPS = 10
_CURVES = ("loss", "accuracy", "margin", "utility")


def learning_fingerprint(planned: PlannedMerge, data: SafetyData, given: Given) -> dict[str, Any]:
    """Return everything that decides a learned mask, as JSON.

    Names and places of models are not in it: what counts is what is in their files.

    Args:
        planned: the merge.
        data: what the mask is learned from.
        given: masks that are not learned, or that learning starts from.

    Raises:
        RecipeError: a model's files or tokenizer can't be read.
    """
    # What has no effect decides nothing.
    unused = {"patience", "look_every"} if planned.settings.patience == NEVER else set()
    settings = planned.settings.model_dump(exclude={*_USE_ONLY, *unused})
    cache_dir = planned.options.machine.cache_dir
    validation = {}
    if data.validation:
        content = [[p.prompt, p.chosen, p.rejected] for p in data.validation]
        validation = {"validation data": json_digest(content)}
    return {
        "models": [content_fingerprint(model, cache_dir) for model in planned.models],
        "model configuration": json_digest(_configuration(planned)),
        "tokenizer": json_digest(_tokens(planned)),
        "chat template": json_digest(planned.tokenizer.chat_template),
        "data": json_digest([[p.prompt, p.chosen, p.rejected] for p in data.pairs]),
        "held-out data": json_digest([[p.prompt, p.chosen, p.rejected] for p in data.held_out]),
        "learned models": [planned.models.index(model) for model in planned.learners],
        "given masks": [
            [planned.models.index(m), own.masks.header.digest, own.masks.model, own.is_start]
            for m, own in given.items()
        ],
        **validation,
        "utility data": json_digest([[e.prompt, e.chosen] for e in data.utility]),
        "settings": {k: v for k, v in settings.items() if k not in _STAND_INS},
        "parameters of the tensors": json_digest([_resolved(planned, *t) for t in planned.tensors]),
        "dtype": planned.config.dtype or "as stored",
        DATE: data.date,
        "versions": versions(),
    }


def recorded_date(fingerprint: Any) -> str | None:
    """Return the date that a chat template wrote when a mask was learned, None where none is known.

    Args:
        fingerprint: as stored with a mask or a checkpoint, perhaps by a stranger.
    """
    written = fingerprint.get(DATE) if isinstance(fingerprint, dict) else None
    try:
        return date.fromisoformat(str(written)).isoformat()
    except ValueError:
        return None


def resolved_learning(planned: PlannedMerge) -> list[Any]:
    """Return what of a recipe decides its mask, as JSON, as far as the recipe itself says."""
    settings = planned.settings.model_dump(exclude={*_USE_ONLY, "preset"})
    of_models = {str(model): own for model, own in planned.of_models.items()}
    return [settings, of_models, [_resolved(planned, *tensor) for tensor in planned.tensors]]


def _resolved(planned: PlannedMerge, weight: Any, task: Any) -> list[Any]:
    """Return how mergekit makes a tensor: from which tensors, in which way."""
    shared = {k: v for k, v in task.parameters.items() if k not in _USE_ONLY and v is not None}
    per_model = [
        sorted(
            (k, v)
            for k, v in task.input_parameters.get(model, {}).items()
            if k not in _USE_ONLY and v is not None
        )
        for model in task.model_order
    ]
    numbers = [planned.models.index(model) for model in task.model_order]
    names = gather_task(task).weight_info
    taken = [str(names[model].name) for model in task.model_order]
    made = [numbers, taken, type(task.gather_tensors).__name__]
    return [weight.name, sorted(shared.items(), key=str), per_model, made]


def _configuration(planned: PlannedMerge) -> list[Any]:
    """Return what transformers makes the model that learns from."""
    content = planned.out_config.to_dict()
    deciding = {k: v for k, v in content.items() if k not in _CONFIGURATION_NOTES}
    code = []
    if planned.options.trust_remote_code:
        folder = LoaderCache().get(planned.base_model).index.base_path
        code = [file_digest(file) for file in sorted(Path(folder).glob("*.py"))]
    return [deciding, code]


def _tokens(planned: PlannedMerge) -> list[Any]:
    """Return the tokenizer, and how each model's vocabulary is laid out for it."""
    tokenizer, info = planned.tokenizer, planned.tokenizer_info
    if tokenizer.is_fast:
        own: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        # How texts were last cut and filled up stands there too.
        own |= dict.fromkeys(("padding", "truncation"))
    else:
        own = sorted(tokenizer.get_vocab().items())
    laid_out = []
    if info is not None:
        laid_out = [sorted(info.permutations.get(model, {}).items()) for model in planned.models]
    return [own, tokenizer.special_tokens_map, laid_out, plain(planned.config.tokenizer)]


def provenance(
    planned: PlannedMerge,
    data: SafetyData,
    fingerprint: dict[str, Any],
    history: Sequence[dict[str, Any]],
    tensors: Sequence[MaskedTensor],
    compared: HeldOut | str,
    given: Given,
) -> dict[str, Any]:
    """Return what is recorded with a mask, as JSON: no text of the data is in it.

    Args:
        planned: the merge.
        data: what the mask was learned from.
        fingerprint: see ``learning_fingerprint``.
        history: a row per step of learning.
        tensors: that have a mask.
        compared: what the held-out pairs say, or why they say nothing.
        given: masks that are not learned, or that learning started from.
    """
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
            "held_out": len(data.held_out),
            "left_out": data.dropped,
            "cut": data.cut,
            "fingerprint": fingerprint["data"],
        },
        "utility_dataset": {
            "source": settings.utility_dataset,
            "examples": len(data.utility),
            "cut": cut_counts(data.utility),
            "fingerprint": fingerprint["utility data"],
        },
        "settings": recorded_settings(planned),
        "seed": settings.seed,
        "steps": len(history),
        "tensors": len(tensors),
        "entries": sum(len(t.models) * math.prod(t.layout.shape) for t in tensors),
        "learned": [str(model) for model in planned.learners],
        "masks": _recorded(given),
        "training": {
            "first_steps": _curve_mean(history[:_CURVE_STEPS]),
            "last_steps": _curve_mean(history[-_CURVE_STEPS:]),
        },
        KEY: {"pairs": 0, "why_none": compared} if isinstance(compared, str) else compared.record,
        "versions": versions(),
        "fingerprint": fingerprint,
    }


def provenance_of_use(planned: PlannedMerge, given: Given) -> dict[str, Any]:
    """Return what is recorded with masks that other recipes learned, as JSON."""
    cache_dir = planned.options.machine.cache_dir
    return {
        "recipe": planned.recipe,
        "base_model": str(planned.base_model),
        "models": {str(m): content_fingerprint(m, cache_dir) for m in planned.models},
        "settings": recorded_settings(planned),
        "masks": _recorded(given),
        "versions": versions(),
    }


def _recorded(given: Given) -> dict[str, Any]:
    """Return where the masks that a recipe gives are from, by model.

    Of a published one, ``pinned`` names the commit that was taken, ORGANISATION/NAME@COMMIT.
    """
    return {
        str(model): {
            "source": own.source,
            "pinned": pinned_id(own.masks.path),
            "digest": own.masks.header.digest,
            "is_start": own.is_start,
            "provenance": own.provenance,
        }
        for model, own in given.items()
    }


def recorded_settings(planned: PlannedMerge) -> dict[str, Any]:
    """Return all settings; those that differ between tensors as the recipe says them."""
    settings = planned.settings.model_dump()
    content = plain(planned.config.parameters or {})
    varied = {k: v for k, v in content.items() if k in settings and isinstance(v, (dict, list))}
    return settings | varied


def _curve_mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    found = {key: [row[key] for row in rows if row[key] is not None] for key in _CURVES}
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def differences(
    record: dict[str, Any], fingerprint: dict[str, Any], models: Sequence[str]
) -> list[str]:
    """Return in what a mask stored with ``record`` differs from one with ``fingerprint``.

    Args:
        record: provenance, perhaps made by a stranger.
        fingerprint: see ``learning_fingerprint``.
        models: names of the models of ``fingerprint``, in its order.
    """
    before = record.get("fingerprint")
    before = before if isinstance(before, dict) else {}
    found = []
    for key, value in fingerprint.items():
        old = before.get(key)
        if old == value:
            continue
        parts: list[str] = []
        if key == "models" and isinstance(old, list) and len(old) == len(value):
            parts = [name for name, a, b in zip(models, old, value, strict=True) if a != b]
        elif isinstance(value, dict) and isinstance(old, dict):
            parts = sorted(k for k in {*value, *old} if value.get(k) != old.get(k))
        found.append(f"{key} ({', '.join(parts)})" if parts else key)
    return found
