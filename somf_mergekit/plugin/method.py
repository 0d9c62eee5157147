"""The merge method: mask every task vector with a learned mask, then let mergekit fuse them."""

import os
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from ..common.errors import RecipeError
from ..fusion.fuse import Factors
from ..fusion.fusion_methods import OwnMethod, fusion_specs
from ..fusion.groups import is_finite, is_shared_buffer, not_finite
from ..fusion.masked_fusion import fused_masked
from ..mask.artifact import MaskSet
from ..mask.artifact_files import masks_path
from ..mask.granularity import mask_shape_problem
from ..recipe import settings as recipe
from ..recipe.name_patterns import may_get_mask

_OWN_NAMES = frozenset(parameter.name for parameter in recipe.parameters())


class SomfMethod(OwnMethod):
    """``merge_method: somf``, on mergekit's public interface alone.

    Works in ``mergekit-yaml`` (where the planner's pre-pass fills in the mask) and, with a mask
    given, in ``merge_state_dicts`` and ``merge_tensors`` alike.
    """

    @property
    def spec(self) -> MergeMethodSpec:
        """Our parameters with those of every fusion that is registered by now."""
        return _spec(fusion_specs(_OWN_NAMES))

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Return the merged tensor, in the base tensor's dtype.

        Raises:
            RecipeError: no mask is given, it does not fit the tensor, or the result is not finite.
        """
        name = group.metadata.name
        is_planned = parameters[recipe.MASK_TENSOR] is not None
        if group.non_base and not is_planned and not any(parameters["mask"].values()):
            raise RecipeError(
                "somf has no mask to merge with. Learn one first (`mergekit-somf learn recipe.yml "
                "DIR`) and give its folder as the parameter `mask`."
            )
        if name is None:
            raise RecipeError("somf finds masks by tensor name: merge_tensors needs `name`")
        base = group.base.tensor
        if not base.is_floating_point() and is_shared_buffer(group):
            return base
        factors = _factors(group, parameters)
        watch, observer = None, parameters[recipe.OBSERVER]
        # A slice may be of the base alone.
        if observer is not None and group.non_base:
            masked = {str(model): _mask_name(group, parameters) for model in factors}
            watch = observer.watch(group, masked)
        result = fused_masked(group, factors, parameters, watch)
        if not is_finite(result):
            if is_shared_buffer(group):
                return base
            raise RecipeError(not_finite(group) or f"{name}: the merged tensor is not finite")
        return result


def _factors(group: TensorGroup, parameters: Mapping[str, Any]) -> Factors:
    """Return what the task vectors of models are multiplied by; those without a mask are not there.

    Raises:
        RecipeError: a mask doesn't fit the tensor, or has none for a model.
    """
    if not may_get_mask(str(group.metadata.name), parameters["include"], parameters["exclude"]):
        return {}
    found: dict[Hashable, tuple[Tensor, ...]] = {}
    # Models with one mask share one factor, which fusions make use of.
    known: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    for entry in group.non_base:
        source = parameters["mask"][entry.id]
        if not source:
            continue
        masks = _opened(str(source)).of(parameters[recipe.MASK_MODEL][entry.id] or str(entry.id))
        name = _mask_name(group, parameters)
        if name in masks:
            key = masks.path, masks.stored_as(name)
            if key not in known:
                known[key] = _factor(group, masks, name, parameters)
            found[entry.id] = known[key]
    return found


def _mask_name(group: TensorGroup, parameters: Mapping[str, Any]) -> str:
    return str(parameters[recipe.MASK_TENSOR] or group.metadata.name)


def _factor(
    group: TensorGroup, masks: MaskSet, name: str, parameters: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    base = group.base.tensor
    problem = mask_shape_problem(
        str(group.metadata.name), masks.shape(name), tuple(base.shape), masks.path
    )
    if problem:
        raise RecipeError(problem)
    factors = masks.factors(
        name,
        parameters["mask_kind"],
        parameters["mask_rescale"],
        temperature=parameters["temperature"],
        seed=parameters["seed"],
    )
    return tuple(factor.to(base.device) for factor in factors)


@lru_cache(maxsize=4)
def _spec(theirs: tuple[ParameterSpec, ...]) -> MergeMethodSpec:
    shared, of_model = ParameterScope.SHARED, ParameterScope.NON_BASE
    own = tuple(
        ParameterSpec(
            p.name,
            p.value_type,
            of_model if p.per_model or p.for_models else shared,
            p.default,
            p.help,
        )
        for p in recipe.parameters()
        if p.merge
    )
    internal = (
        ParameterSpec(recipe.MASK_TENSOR, str | None, shared, None),
        ParameterSpec(recipe.MASK_MODEL, str | None, of_model, None),
        ParameterSpec(recipe.OBSERVER, Any, shared, None),
    )
    return MergeMethodSpec(
        name=recipe.METHOD_NAME,
        pretty_name="SOMF",
        reference_url="https://arxiv.org/abs/2405.09055",
        parameters=(*own, *internal, *theirs),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )


def _opened(source: str) -> MaskSet:
    path = masks_path(source)
    stat = os.stat(path)
    return _opened_version(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _opened_version(path: str, _version: tuple[int, int, int]) -> MaskSet:
    return MaskSet.open(path)


def _register() -> None:
    if recipe.METHOD_NAME not in {method.spec.name for method in registry.registered_methods()}:
        registry.register(SomfMethod())


_register()
