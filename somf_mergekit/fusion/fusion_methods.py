"""The mergekit methods that can fuse masked models: which there are, and what each takes."""

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any

from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
)

from ..common.errors import RecipeError


class OwnMethod(GroupMergeMethod):
    """A merge method of this package: it takes models of its own kind, and fuses no masked ones."""

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the models of a merge.

        Raises:
            RecipeError: they are too few or too many, or the base is not among them.
        """
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise RecipeError(f"{self.spec.name}: {error}") from error


def known_fusions() -> dict[str, MergeMethod]:
    """Return every method that is registered and can fuse, by name."""
    return _fusing(registry.registered_methods())


def takes_base(method: MergeMethod) -> bool:
    """Return whether a method gets the base beside the masked models."""
    return method.spec.contract.base not in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)


def fusion_specs(taken: frozenset[str]) -> tuple[ParameterSpec, ...]:
    """Return the specs of all fusions' parameters, one per name, unset by default.

    Unset, the chosen fusion's own default applies. A name that some fusion takes per model can be
    given per model.

    Args:
        taken: names that are left out.
    """
    return _fusion_specs(tuple(registry.registered_methods()), taken)


def _fusing(methods: Iterable[MergeMethod]) -> dict[str, MergeMethod]:
    return {m.spec.name: m for m in methods if not isinstance(m, OwnMethod)}


@lru_cache(maxsize=4)
def _fusion_specs(
    registered: tuple[MergeMethod, ...], taken: frozenset[str]
) -> tuple[ParameterSpec, ...]:
    by_name: dict[str, list[ParameterSpec]] = {}
    for method in _fusing(registered).values():
        for spec in method.spec.parameters:
            if spec.name not in taken:
                by_name.setdefault(spec.name, []).append(spec)
    return tuple(_common_spec(name, specs) for name, specs in by_name.items())


def _common_spec(name: str, specs: Sequence[ParameterSpec]) -> ParameterSpec:
    types = dict.fromkeys(spec.value_type for spec in specs)
    is_shared = all(spec.scope is ParameterScope.SHARED for spec in specs)
    # The base is masked by nothing and has no value of its own.
    scope = ParameterScope.SHARED if is_shared else ParameterScope.NON_BASE
    value_type: Any = reduce(operator.or_, [*types, None])
    return ParameterSpec(name, value_type, scope, None, specs[0].description)


def own_arguments(
    method: MergeMethod, values: Mapping[str, Any], models: Sequence[Any]
) -> Mapping[str, Any]:
    """Return the fusion's own parameters, its defaults where a model has no value.

    Args:
        method: the fusion.
        values: as for ``fuse.fused``.
        models: ids of the fine-tuned models.

    Raises:
        RecipeError: the models have different values of what the fusion takes once.
    """
    own: dict[str, Any] = {}
    for spec in method.spec.parameters:
        value = values.get(spec.name)
        if isinstance(value, Mapping):
            per_model = {model: value.get(model) for model in models}
            if all(item is None for item in per_model.values()):
                continue
            if spec.scope is ParameterScope.SHARED:
                distinct = set(per_model.values())
                if len(distinct) > 1:
                    raise RecipeError(
                        f"{method.spec.name} takes one {spec.name} for all models, not one for each"
                    )
                value = distinct.pop()
            elif not spec.required:
                value = {m: spec.default if v is None else v for m, v in per_model.items()}
            else:
                value = {m: v for m, v in per_model.items() if v is not None}
        if value is not None:
            own[spec.name] = value
    return own
