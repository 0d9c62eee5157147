"""The merge method: mask every task vector with one learned mask, then let mergekit fuse them."""

import os
from collections.abc import Mapping
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
from ..fusion.fuse import fused
from ..fusion.fusion_methods import OwnMethod, fusion_specs
from ..fusion.groups import as_type, is_finite, is_shared_buffer, not_finite
from ..fusion.merges import fused_masked, show_task_vectors
from ..mask.artifact import MaskSet, masks_path
from ..mask.granularity import mask_shape_problem
from ..recipe import settings as recipe

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
        mask_source = parameters["mask"]
        if not mask_source:
            raise RecipeError(
                "somf has no mask to merge with. Learn one first (`mergekit-somf learn recipe.yml "
                "DIR`) and give its folder as the parameter `mask`."
            )
        masks = _opened(str(mask_source))
        if name is None:
            raise RecipeError("somf finds masks by tensor name: merge_tensors needs `name`")
        base = group.base.tensor
        if not base.is_floating_point() and is_shared_buffer(group):
            return base
        factor = _factor(group, masks, parameters)
        watch, observer = None, parameters[recipe.OBSERVER]
        # A slice may be of the base alone.
        if observer is not None and group.non_base:
            mask_name = None if factor is None else str(parameters[recipe.MASK_TENSOR] or name)
            watch = observer.watch(group, mask_name)
        if factor is None:
            if watch is not None:
                show_task_vectors(group, torch.ones((), device=base.device), watch)
            result = as_type(fused(group, parameters), base.dtype)
        else:
            result = fused_masked(group, factor, parameters, watch)
        if not is_finite(result):
            if is_shared_buffer(group):
                return base
            raise RecipeError(not_finite(group) or f"{name}: the merged tensor is not finite")
        return result


def _factor(
    group: TensorGroup, masks: MaskSet, parameters: Mapping[str, Any]
) -> torch.Tensor | None:
    """Return what the task vectors are multiplied by, None where they have no mask."""
    name = str(group.metadata.name)
    mask_name = parameters[recipe.MASK_TENSOR] or name
    if mask_name not in masks:
        return None
    if not recipe.may_get_mask(name, parameters["include"], parameters["exclude"]):
        return None
    base = group.base.tensor
    problem = mask_shape_problem(name, masks.shape(mask_name), tuple(base.shape), masks.path)
    if problem:
        raise RecipeError(problem)
    factor = masks.factor(
        mask_name,
        parameters["mask_kind"],
        parameters["mask_rescale"],
        temperature=parameters["temperature"],
        seed=parameters["seed"],
    )
    return factor.to(base.device)


@lru_cache(maxsize=4)
def _spec(theirs: tuple[ParameterSpec, ...]) -> MergeMethodSpec:
    own = tuple(
        ParameterSpec(p.name, p.value_type, ParameterScope.SHARED, p.default, p.help)
        for p in recipe.parameters()
        if p.merge
    )
    internal = (
        ParameterSpec(recipe.MASK_TENSOR, str | None, ParameterScope.SHARED, None),
        ParameterSpec(recipe.OBSERVER, Any, ParameterScope.SHARED, None),
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
