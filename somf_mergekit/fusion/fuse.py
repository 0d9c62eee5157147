"""What the mergekit methods make of masked models."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from ..common.errors import RecipeError
from ..mask.masking import masked_task_vector
from .fusion_methods import own_arguments, takes_base
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
