"""The mergekit methods that fuse masked models: which there are, what each takes and gives."""

import contextlib
import hashlib
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from .errors import RecipeError
from .masking import masked_task_vector
from .recipe import parameters
from .trimming import TRIMMING, trimmed

# Fusions that are Fuse(base; task vectors * c) = start + D * c for every c >= 0 that the models
# share: sums, and also sign elections, which a shared positive factor can't turn.
SUMS = ("task_arithmetic", "linear", "passthrough")
_LINEAR_WHEN_DENSE = (
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
)
_RANDOMLY_DROPPED = ("dare_linear", "dare_ties")


class OwnMethod(GroupMergeMethod):
    """A merge method of this package: it takes models of its own kind, and fuses no masked ones.

    Attributes:
        takes: which models, in words that an error begins with.
    """

    takes: str

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
            raise RecipeError(f"{self.takes}: {error}") from error


def known_fusions() -> dict[str, MergeMethod]:
    """Return every method that is registered and can fuse, by name."""
    return _fusing(registry.registered_methods())


def takes_base(method: MergeMethod) -> bool:
    """Return whether a method gets the base beside the masked models."""
    return method.spec.contract.base not in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)


def fusion_specs() -> tuple[ParameterSpec, ...]:
    """Return the specs of all fusions' parameters, one per name, unset by default.

    Unset, the chosen fusion's own default applies. A name that some fusion takes per model can be
    given per model.
    """
    return _fusion_specs(tuple(registry.registered_methods()))


def _fusing(methods: Iterable[MergeMethod]) -> dict[str, MergeMethod]:
    return {m.spec.name: m for m in methods if not isinstance(m, OwnMethod)}


@lru_cache(maxsize=4)
def _fusion_specs(registered: tuple[MergeMethod, ...]) -> tuple[ParameterSpec, ...]:
    ours = {parameter.name for parameter in parameters()}
    types: dict[str, list[Any]] = {}
    scopes: dict[str, ParameterScope] = {}
    helps: dict[str, str | None] = {}
    for method in _fusing(registered).values():
        for spec in method.spec.parameters:
            if spec.name in ours:
                continue
            types.setdefault(spec.name, [])
            if spec.value_type not in types[spec.name]:
                types[spec.name].append(spec.value_type)
            per_model = spec.scope is not ParameterScope.SHARED
            if per_model or spec.name not in scopes:
                # The base is masked by nothing and has no value of its own.
                scopes[spec.name] = ParameterScope.NON_BASE if per_model else spec.scope
            helps.setdefault(spec.name, spec.description)
    return tuple(
        ParameterSpec(name, reduce(operator.or_, [*kinds, None]), scopes[name], None, helps[name])
        for name, kinds in types.items()
    )


def fused(group: TensorGroup, values: Mapping[str, Any]) -> Tensor:
    """Fuse the inputs of one tensor with the mergekit method that ``values`` name, in float32.

    Random numbers of the fusion are a function of the seed and the tensor's name.

    Args:
        group: base and (masked) fine-tuned models of one tensor.
        values: parameters of the somf method; those of the fusion count where they are set.

    Raises:
        RecipeError: the fusion can't fuse this tensor.
    """
    if not group.non_base:
        return group.entries[0].tensor.float()
    method = registry.get(values["fusion"])
    name = group.metadata.name
    if not takes_base(method):
        group = TensorGroup(group.non_base, group.metadata)
    arguments = _arguments(method, values, [entry.id for entry in group.non_base])
    if values["fusion"] in TRIMMING:
        group, arguments = trimmed(with_tensors(group, lambda e: e.tensor.float()), arguments)
    try:
        with _seeded(f"fusion/{values['seed']}/{name}", group.entries[0].tensor.device):
            (result,) = method((group,), parameters=arguments, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{name}: the fusion {values['fusion']} refuses: {error}") from error
    return result


def masked_group(group: TensorGroup, factor: Tensor) -> TensorGroup:
    """Return the group, in float32, with each fine-tuned model as base + masked task vector.

    Args:
        group: with a base; tensors in the weight's shape.
        factor: see ``masking.mask_factor``; broadcasts to the weight.
    """
    base = group.base.tensor.float()
    return with_tensors(
        group,
        lambda entry: (
            base
            if entry.is_base
            else base + masked_task_vector(entry.tensor.float() - base, factor)
        ),
    )


def fused_bases(group: TensorGroup, values: Mapping[str, Any]) -> Tensor:
    """Return the fusion of models that equal the base, float32."""
    base = group.base.tensor.float()
    return fused(with_tensors(group, lambda entry: base), values)


def fused_differences(group: TensorGroup, values: Mapping[str, Any]) -> Tensor:
    """Return D, float32, of a fusion that is start + D c in a shared factor c."""
    base = group.base.tensor.float()
    # What is linear in all of its inputs gives D when its base is zero.
    return fused(with_tensors(group, lambda entry: entry.tensor.float() - base), values)


def with_tensors(group: TensorGroup, tensor_of: Callable[[TensorEntry], Tensor]) -> TensorGroup:
    """Return the group with another tensor in each entry."""
    entries = (TensorEntry(e.id, tensor_of(e), e.is_base) for e in group.entries)
    return TensorGroup(tuple(entries), group.metadata)


def is_linear(values: Mapping[str, Any]) -> bool:
    """Return whether the fusion of these parameters is start + D * c in a shared factor c >= 0."""
    fusion = values["fusion"]
    if fusion in SUMS:
        return True
    if fusion not in _LINEAR_WHEN_DENSE:
        return False
    densities = [d for d in (values.get("density") or {}).values() if d is not None]
    if all(density >= 1 for density in densities):
        return True
    # Which entries are dropped does not depend on the mask; only the rescaling does.
    return fusion in _RANDOMLY_DROPPED and values.get("rescale") is False


def fusion_arguments(values: Mapping[str, Any], models: Sequence[Any]) -> dict[str, Any]:
    """Return all parameters that a fusion goes by, its defaults where nothing is said.

    Args:
        values: as for ``fused``.
        models: ids of the fine-tuned models; what is taken for each is a list in their order.

    Raises:
        RecipeError: the models have different values of what the fusion takes once.
    """
    method = registry.get(values["fusion"])
    said = _arguments(method, values, models)
    found = {}
    for spec in method.spec.parameters:
        value = said.get(spec.name, None if spec.required else spec.default)
        if spec.scope is not ParameterScope.SHARED:
            by_model = value if isinstance(value, Mapping) else dict.fromkeys(models, value)
            value = [by_model.get(model) for model in models]
        found[spec.name] = value
    return found


def _arguments(
    method: MergeMethod, values: Mapping[str, Any], models: Sequence[Any]
) -> Mapping[str, Any]:
    """Return the fusion's own parameters, its defaults where a model has no value.

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


@contextlib.contextmanager
def _seeded(text: str, device: torch.device) -> Iterator[None]:
    """Seed torch's generators from ``text``, and put them back as they were."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little", signed=True)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed: that would disturb other devices' threads.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
