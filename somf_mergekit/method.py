"""The merge method: mask every task vector with one learned mask, then let mergekit fuse them."""

import os
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from . import recipe
from .errors import RecipeError
from .masking import masked_task_vector
from .masks import MaskSet, masks_path

FUSIONS = ("task_arithmetic",)


def fusion_parameters() -> dict[str, tuple[str, ...]]:
    """Return the names of each known fusion's own parameters."""
    return {name: tuple(p.name for p in registry.get(name).spec.parameters) for name in FUSIONS}


def fused(group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
    """Fuse the inputs of one tensor with the mergekit method that ``parameters`` name, in float32.

    Args:
        group: base and (masked) fine-tuned models of one tensor.
        parameters: of the somf method; those of the fusion count where they are set.
    """
    method = registry.get(parameters["fusion"])
    own: dict[str, Any] = {}
    for spec in method.spec.parameters:
        value = parameters.get(spec.name)
        if isinstance(value, PerInputValues):
            value = {key: item for key, item in value.items() if item is not None}
        if value is not None and value != {}:
            own[spec.name] = value
    (result,) = method((group,), parameters=own, dtype=torch.float32)
    return result


def masked_group(group: TensorGroup, mask: Tensor, rescale: str) -> TensorGroup:
    """Return the group, in float32, with each fine-tuned model as base + masked task vector.

    Args:
        group: with a base; tensors in the weight's shape.
        mask: float32, broadcasts to the weight.
        rescale: see ``masking.mask_scale``.
    """
    base = group.base.tensor.float()
    entries = tuple(
        TensorEntry(
            id=entry.id,
            tensor=base
            if entry.is_base
            else base + masked_task_vector(entry.tensor.float() - base, mask, rescale),
            is_base=entry.is_base,
        )
        for entry in group.entries
    )
    return TensorGroup(entries=entries, metadata=group.metadata)


class SomfMethod(GroupMergeMethod):
    """``merge_method: somf``, on mergekit's public interface alone.

    Works in ``mergekit-yaml`` (where the planner's pre-pass fills in the mask) and, with a mask
    given, in ``merge_state_dicts`` and ``merge_tensors`` alike.
    """

    def __init__(self) -> None:
        own = tuple(
            ParameterSpec(p.name, p.value_type, ParameterScope.SHARED, p.default, p.help)
            for p in recipe.parameters()
            if p.merge
        )
        theirs: dict[str, ParameterSpec] = {}
        for name in FUSIONS:
            for spec in registry.get(name).spec.parameters:
                # Unset by default, so that the chosen fusion's own default applies.
                theirs[spec.name] = ParameterSpec(
                    spec.name, spec.value_type | None, spec.scope, None, spec.description
                )
        self.spec = MergeMethodSpec(
            name=recipe.METHOD_NAME,
            pretty_name="SOMF",
            reference_url="https://arxiv.org/abs/2405.09055",
            parameters=(*own, *theirs.values()),
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the models of a merge.

        Raises:
            RecipeError: the base, or every fine-tuned model, is missing.
        """
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise RecipeError(
                f"somf needs base_model and at least one fine-tuned model: {error}"
            ) from error

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
        if name in masks and recipe.may_get_mask(
            name, parameters["include"], parameters["exclude"]
        ):
            mask = masks.mask(
                name,
                parameters["mask_kind"],
                temperature=parameters["temperature"],
                seed=parameters["seed"],
            ).to(group.base.tensor.device)
            problem = mask_shape_problem(
                name, tuple(mask.shape), tuple(group.base.tensor.shape), masks.path
            )
            if problem:
                raise RecipeError(problem)
            masked = masked_group(group, mask, parameters["mask_rescale"])
        else:
            masked = group
        result = fused(masked, parameters).to(group.base.tensor.dtype)
        if not torch.isfinite(result).all():
            raise RecipeError(not_finite(group) or f"{name}: the merged tensor is not finite")
        return result


def not_finite(group: TensorGroup) -> str | None:
    """Return a sentence on the first input of the group with NaN or infinity, if there is one."""
    for entry in group.entries:
        if not torch.isfinite(entry.tensor).all():
            return (
                f"{group.metadata.name} of {entry.id} has NaN or infinite entries: the checkpoint "
                "is damaged, or was made in a dtype it overflowed"
            )
    return None


def mask_shape_problem(
    name: str, mask: tuple[int, ...], weight: tuple[int, ...], where: str
) -> str | None:
    """Return a sentence on a mask that does not broadcast to its weight, None where it does."""
    try:
        fits = torch.broadcast_shapes(mask, weight) == torch.Size(weight)
    except RuntimeError:
        fits = False
    if fits:
        return None
    return (
        f"{name}: the mask in {where} has shape {mask}, the weight {weight}: the mask is of "
        "another model"
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
