"""Whether a fusion takes these models and parameters, tried on small tensors, none loaded."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    ParameterScope,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)

from ..common.errors import RecipeError
from ..fusion.fuse import fused, masked_group
from ..fusion.fusion_methods import known_fusions, takes_base
from ..fusion.merges import Learned
from .settings import parameters

# The value of a parameter without a default where only the kind of a fusion is asked for.
_TRIAL = 0.4


def count_problem(fusion: str, fine_tuned: int) -> str | None:
    """Return a sentence where the fusion does not take so many fine-tuned models."""
    method = known_fusions()[fusion]
    with_base = takes_base(method)
    ids = [*range(fine_tuned), *(["base"] if with_base else [])]
    try:
        method.spec.contract.validate_ids(ids, "base" if with_base else None)
    except ValueError as error:
        counted = "the base among them" if with_base else "the base not counted"
        return f"{fusion} can't fuse {fine_tuned} fine-tuned models: {error} ({counted})"
    return None


def name_problem(fusion: str) -> str | None:
    """Return a sentence where the fusion has a parameter named as one of ours."""
    ours = {parameter.name for parameter in parameters()}
    shared = [p.name for p in known_fusions()[fusion].spec.parameters if p.name in ours]
    if not shared:
        return None
    return f"{fusion} has parameters that somf has too ({', '.join(shared)}): it can't be used here"


def fusing_problem(
    values: Mapping[str, Any], models: Sequence[Any], learned: Learned
) -> str | None:
    """Return a sentence where the fusion refuses these parameters, or can't be learned through.

    It is tried on small random tensors: nothing is loaded.

    Args:
        values: parameters as for ``fused``.
        models: ids of the fine-tuned models.
        learned: the models of each mask that is to be learned through the fusion.
    """
    try:
        differentiable = _is_differentiable(values, models, learned or (tuple(models),))
    except RecipeError as error:
        return error.message.removeprefix("(trial): ")
    if differentiable or not learned:
        return None
    if len(learned) > 1 and _is_differentiable(values, models, (tuple(models),)):
        return (
            f"the fusion {values['fusion']} can't tell these models apart, so no mask can be "
            "learned for each; set `mask_sharing: shared`"
        )
    return (
        f"the fusion {values['fusion']} can't be differentiated, so no mask can be learned through "
        f"it. Learn with one of {', '.join(_differentiable(len(models)))}; a learned mask can be "
        "fused with any by the parameter `mask`"
    )


def weights_problem(values: Mapping[str, Any], models: Sequence[Any]) -> str | None:
    """Return a sentence where the fusion gives the same if all weights are multiplied alike.

    Args:
        values: parameters as for ``fused``, the weights by model.
        models: ids of the fine-tuned models.

    Raises:
        RecipeError: the fusion refuses these parameters.
    """
    group = _trial_group(models, torch.Generator().manual_seed(0))
    scaled = {m: None if w is None else 2 * w for m, w in (values.get("weight") or {}).items()}
    if not torch.allclose(fused(group, values), fused(group, {**values, "weight": scaled})):
        return None
    fusion = values["fusion"]
    known = {spec.name for spec in known_fusions()[fusion].spec.parameters}
    way_out = "sweep lambda instead" if "lambda" in known else "it has no such line of merges"
    if "normalize" in known:
        way_out += ", or set `normalize: false`"
    return (
        f"a factor on all weights changes nothing, for {fusion} takes weights relative to each "
        f"other here; {way_out}"
    )


def _is_differentiable(values: Mapping[str, Any], models: Sequence[Any], learned: Learned) -> bool:
    draw = torch.Generator().manual_seed(0)
    group = _trial_group(models, draw)
    factors = [(0.5 + torch.rand(6, 8, generator=draw)).requires_grad_() for _ in learned]
    of_models = {
        model: (factor,) for own, factor in zip(learned, factors, strict=True) for model in own
    }
    with torch.enable_grad():
        result = fused(masked_group(group, of_models), values)
        if not result.requires_grad:
            return False
        try:
            found = torch.autograd.grad(result.square().sum(), factors, allow_unused=True)
        except RuntimeError:
            return False
    return all(own is not None and bool(torch.isfinite(own).all()) for own in found)


def _trial_group(models: Sequence[Any], draw: torch.Generator) -> TensorGroup:
    """Return a base and models of small random tensors."""
    tensors = [torch.randn(6, 8, generator=draw) for _ in range(len(models) + 1)]
    entries = [TensorEntry("base", tensors[0], True)]
    entries += [TensorEntry(m, t) for m, t in zip(models, tensors[1:], strict=True)]
    return TensorGroup(tuple(entries), TensorMetadata(name="(trial)"))


def _differentiable(models: int) -> list[str]:
    """Return the fusions that a mask for so many models can be learned through."""
    found = []
    for name, method in known_fusions().items():
        values: dict[str, Any] = {"fusion": name, "seed": 0}
        for spec in method.spec.parameters:
            if spec.required:
                shared = spec.scope is ParameterScope.SHARED
                values[spec.name] = _TRIAL if shared else dict.fromkeys(range(models), _TRIAL)
        if count_problem(name, models) or name_problem(name):
            continue
        with contextlib.suppress(RecipeError):
            if _is_differentiable(values, range(models), (tuple(range(models)),)):
                found.append(name)
    return found
