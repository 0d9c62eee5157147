"""What mergekit's methods make of masked models."""

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from ..common.errors import RecipeError
from ..mask.granularity import product
from .fusion_methods import own_arguments, takes_base

# Of each model, tensors that broadcast to the weight, whose product is its mask's factor. One that
# is not there has no mask; those that share one have the same object.
Factors = Mapping[Hashable, tuple[Tensor, ...]]

# Fusions that are Fuse(base; task vectors * c) = start + D * c for every c >= 0: sums.
SUMS = ("task_arithmetic", "linear", "passthrough")
_SUMS_WHEN_DENSE = ("dare_linear", "breadcrumbs", "della_linear")
# Sign elections, which a positive factor can't turn where the models share it.
_LINEAR_WHEN_DENSE = (*_SUMS_WHEN_DENSE, "ties", "dare_ties", "breadcrumbs_ties", "della")
_RANDOMLY_DROPPED = ("dare_linear", "dare_ties")


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
    arguments = own_arguments(method, values, [entry.id for entry in group.non_base])
    if values["fusion"] == "ties":
        group, arguments = _trimmed(with_tensors(group, lambda e: e.tensor.float()), arguments)
    try:
        with _seeded(f"fusion/{values['seed']}/{name}", group.entries[0].tensor.device):
            (result,) = method((group,), parameters=arguments, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{name}: the fusion {values['fusion']} refuses: {error}") from error
    return result


def masked_group(group: TensorGroup, factors: Factors) -> TensorGroup:
    """Return the group, in float32, with each fine-tuned model as base + masked task vector.

    Args:
        group: with a base; tensors in the weight's shape.
        factors: see ``masking.mask_factor``.
    """
    base = group.base.tensor.float()

    def masked(entry: TensorEntry) -> Tensor:
        if entry.is_base:
            return base
        factor = factors.get(entry.id, ())
        if not factor:
            return entry.tensor.float()
        return base + (entry.tensor.float() - base) * product(factor)

    return with_tensors(group, masked)


def with_tensors(group: TensorGroup, tensor_of: Callable[[TensorEntry], Tensor]) -> TensorGroup:
    """Return the group with another tensor in each entry."""
    entries = (TensorEntry(e.id, tensor_of(e), e.is_base) for e in group.entries)
    return TensorGroup(tuple(entries), group.metadata)


def in_order(group: TensorGroup, values: Mapping[str, Any]) -> TensorGroup:
    """Return the group with its models in the order of their names, where the fusion has no other.

    So that a merge of models with masks of their own doesn't hang on their order in the recipe,
    which decides the order of sums, and what is drawn for which model.
    """
    if values["fusion"] not in (*SUMS, *_LINEAR_WHEN_DENSE):
        return group
    entries = sorted(group.entries, key=lambda entry: (not entry.is_base, str(entry.id)))
    return TensorGroup(tuple(entries), group.metadata)


def is_linear(values: Mapping[str, Any], is_shared: bool = True) -> bool:
    """Return whether the fusion of these parameters is start + the sum of each D * c.

    Args:
        values: parameters of the somf method.
        is_shared: whether all models share one factor c >= 0; else each has its own.
    """
    fusion = values["fusion"]
    if fusion in SUMS:
        return True
    if fusion not in (_LINEAR_WHEN_DENSE if is_shared else _SUMS_WHEN_DENSE):
        return False
    densities = [d for d in (values.get("density") or {}).values() if d is not None]
    if all(density >= 1 for density in densities):
        return True
    # Which entries are dropped does not depend on the mask; only the rescaling does.
    return fusion in _RANDOMLY_DROPPED and values.get("rescale") is False


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


def _trimmed(
    group: TensorGroup, arguments: Mapping[str, Any]
) -> tuple[TensorGroup, Mapping[str, Any]]:
    """Trim task vectors as TIES does; return also arguments that ask for no more trimming.

    Of each task vector, the entries of the largest magnitude stay (arXiv 2306.01708). mergekit
    sorts whole task vectors for it, which takes most of the time where a mask is learned, since
    each step trims anew; a threshold gives the same at a fraction. As many entries stay; which of
    equal ones at the threshold do may differ, as mergekit's sort leaves open. Where trimmed task
    vectors are to be rescaled, it is left to mergekit.

    Args:
        group: with a base; float32.
        arguments: of TIES.
    """
    densities = arguments.get("density")
    if not densities or arguments.get("rescale"):
        return group, arguments
    base = group.base.tensor

    def entry(given: TensorEntry) -> TensorEntry:
        density = 1.0 if given.is_base else densities[given.id]
        if not 0 < density < 1 or given.tensor.numel() == 0:
            return given
        stays = largest((given.tensor - base).detach(), density)
        return TensorEntry(given.id, torch.where(stays, given.tensor, base), given.is_base)

    entries = tuple(map(entry, group.entries))
    whole = {model: 1.0 if density > 0 else density for model, density in densities.items()}
    return TensorGroup(entries, group.metadata), {**arguments, "density": whole}


def largest(values: Tensor, density: float) -> Tensor:
    """Return which entries have the largest magnitude, bool in the shape of ``values``.

    Args:
        values: float32; NaN counts as the largest.
        density: their share, rounded down to whole entries, at least one.
    """
    sizes = values.abs().flatten()
    count = max(1, int(density * len(sizes)))
    place = len(sizes) - count
    if sizes.device.type == "cpu":
        # A fraction of the time of torch's kthvalue.
        threshold = float(np.partition(sizes.numpy(), place)[place])
    else:
        threshold = float(sizes.kthvalue(place + 1).values)
    found = ~(sizes <= threshold)
    equal = (sizes == threshold).nonzero().flatten()
    found[equal[: count - int(found.sum())]] = True
    return found.view(values.shape)
