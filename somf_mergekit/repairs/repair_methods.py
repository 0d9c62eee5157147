"""The repairs as merge methods, on mergekit's public interface alone."""

from collections.abc import Hashable, Mapping
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
from ..fusion.fusion_methods import OwnMethod
from ..fusion.groups import is_finite, is_shared_buffer, not_finite
from .catalogue import ALIGNED, FINE_TUNED, REPAIRS, ROLE, Repair


class RepairMethod(OwnMethod):
    """A repair; base_model is the aligned model, the others say their ``role``."""

    def __init__(self, repair: Repair):
        self.repair = repair
        self.spec = MergeMethodSpec(
            name=repair.name,
            pretty_name=repair.pretty_name,
            reference_url=repair.source,
            parameters=tuple(
                ParameterSpec(
                    parameter.name,
                    parameter.value_type,
                    ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
                    parameter.default,
                    parameter.help,
                )
                for parameter in repair.parameters
            ),
            contract=InputContract(
                base=BasePolicy.REQUIRED,
                min_non_base=len(repair.needs) - len(repair.may_lack),
                max_non_base=len(repair.needs),
            ),
        )

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Return the repaired tensor, computed in float32, in the base tensor's dtype.

        Raises:
            RecipeError: the models' roles are not what the repair needs, or an input or the result
                is not finite.
        """
        if is_shared_buffer(group):
            return group.base.tensor
        broken = not_finite(group)
        if broken:
            raise RecipeError(broken)
        tensors = self._by_role(group, parameters.pop(ROLE))
        base = group.base.tensor
        result = self.repair.formula(**tensors, **parameters).to(base.dtype)
        if not is_finite(result):
            raise RecipeError(
                f"{group.metadata.name}: {self.repair.name} gives numbers that {base.dtype} can't "
                f"hold. Try smaller parameters, or another dtype."
            )
        return result

    def _by_role(self, group: TensorGroup, roles: Mapping[Hashable, str]) -> dict[str, Tensor]:
        found = {ALIGNED: group.base.tensor.float()}
        for entry in group.non_base:
            role = roles[entry.id]
            if role in found or role not in self.repair.needs:
                raise RecipeError(
                    f"{group.metadata.name}: {entry.id} is {role}, and {self.repair.name} takes "
                    f"one model each that is {' and '.join(self.repair.needs)}"
                )
            found[role] = entry.tensor.float()
        for role in self.repair.needs:
            if role not in found and role not in self.repair.may_lack:
                raise RecipeError(
                    f"{group.metadata.name}: there is no {role} model, which {self.repair.name} "
                    "needs"
                )
        found.setdefault(FINE_TUNED, found[ALIGNED])
        return found


def _register() -> None:
    known = {method.spec.name for method in registry.registered_methods()}
    for name, repair in REPAIRS.items():
        if name not in known:
            registry.register(RepairMethod(repair))


_register()
