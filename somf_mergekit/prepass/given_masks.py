"""Masks that a recipe gives, one for all models or for each: whether they fit, whose they are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor

from ..common.errors import noted
from ..mask.artifact import MaskSet
from ..mask.file_content import provenance_of
from ..mask.granularity import mask_shape_problem, weight_storage
from ..mask.masking import PROBABILITY_EDGE
from .headers import planned_tensors
from .plan import PlannedMerge
from .weight_files import content_fingerprint


@dataclass(frozen=True)
class GivenMask:
    """The masks that a recipe gives a model.

    Attributes:
        source: as the recipe names them.
        masks: of this model, or of all.
        is_start: whether they are learned on; else they are used as they are.
    """

    source: str
    masks: MaskSet
    is_start: bool

    @property
    def provenance(self) -> dict[str, Any]:
        """Where these masks are from."""
        model = self.masks.model
        return provenance_of(self.masks, model) if model else self.masks.provenance

    def factors(self, name: str, parameters: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return what a merge multiplies a tensor's task vector with; none where it has no mask.

        Args:
            name: under which its mask is stored.
            parameters: of the somf method for this tensor.
        """
        if self.is_start or name not in self.masks:
            return ()
        how = {key: parameters[key] for key in ("temperature", "seed")}
        kind, rescale = parameters["mask_kind"], parameters["mask_rescale"]
        return self.masks.factors(name, kind, rescale, **how)

    def start(self, name: str) -> Callable[[], Tensor] | None:
        """Return what gives the logits that learning starts from; None where it has none."""
        if not self.is_start or name not in self.masks:
            return None
        return lambda: torch.logit(self.masks.entries(name), eps=PROBABILITY_EDGE)


Given = Mapping[ModelReference, GivenMask]


def starting_logits(
    given: Given, learned: Sequence[Sequence[ModelReference]], name: str
) -> tuple[Callable[[], Tensor] | None, ...]:
    """Return, for each mask that is learned, what gives the logits it starts from, if any.

    Args:
        given: the masks of a tensor's models.
        learned: the models of each mask that is learned.
        name: under which the tensor's mask is stored.
    """
    own = (given.get(models[0]) for models in learned)
    return tuple(mask.start(name) if mask else None for mask in own)


def given_masks(planned: PlannedMerge, problems: list[str]) -> dict[ModelReference, GivenMask]:
    """Return the masks that a recipe gives, by model, after checking them.

    Args:
        planned: the merge.
        problems: gets what is wrong, a sentence each.
    """
    found: dict[ModelReference, GivenMask] = {}
    opened: dict[str, MaskSet] = {}
    fingerprints: dict[ModelReference, str] = {}
    for model, source in planned.given.items():
        with noted(problems):
            if source not in opened:
                opened[source] = MaskSet.open(source, planned.options.transformers_cache)
                problems += _misfits(planned, opened[source], source)
            for one in (planned.base_model, model):
                if one not in fingerprints:
                    cache_dir = planned.options.machine.cache_dir
                    fingerprints[one] = content_fingerprint(one, cache_dir)
            masks, wrong = _own_masks(planned, model, opened[source], source, fingerprints)
            problems += wrong
            found[model] = GivenMask(source, masks, model in planned.learners)
    problems += _start_problems(planned, found)
    return found


def is_one_for_all(planned: PlannedMerge, given: Given) -> bool:
    """Return whether all models of a merge are given the same artifact, which has one mask."""
    models = [model for model in planned.models if model != planned.base_model]
    paths = {given[model].masks.path if model in given else None for model in models}
    return len(paths) == 1 and not any(own.masks.models for own in given.values())


def _own_masks(
    planned: PlannedMerge,
    model: ModelReference,
    masks: MaskSet,
    source: str,
    fingerprints: Mapping[ModelReference, str],
) -> tuple[MaskSet, list[str]]:
    """Return the masks of an artifact that belong to a model, and why they don't.

    Whose they are is what is in the files that they were learned with, not what those are called.
    """
    record = masks.provenance
    recorded = record.get("models")
    recorded = recorded if isinstance(recorded, dict) else {}
    base = recorded.get(str(record.get("base_model")))
    own = [name for name, digest in recorded.items() if digest == fingerprints[model]]
    allowed = planned.of_models[model]["mask_transfer"]
    way_out = (
        "learn one for it (`mergekit-somf learn`), or allow it with `mask_transfer: true`; a mask "
        "is not known to do good to another model than its own"
    )
    problems = []
    if base and base != fingerprints[planned.base_model] and not allowed:
        problems.append(
            f"mask {source} was learned on another base than {planned.base_model} "
            f"({record.get('base_model')}), going by what is in their files: {way_out}"
        )
    elif recorded and not own and not allowed:
        learned_for = ", ".join(n for n in recorded if n != str(record.get("base_model")))
        problems.append(
            f"mask {source} was learned for {learned_for}, not for {model}, going by what is in "
            f"their files: {way_out}"
        )
    if not masks.models:
        return masks, problems
    names = [name for name in (*own, str(model)) if name in masks.models]
    if not names and allowed and len(masks.models) == 1:
        names = list(masks.models)
    if not names and not problems:
        problems.append(
            f"mask {source} has masks for {', '.join(masks.models)}, none for {model}: give it "
            "under the models that it is for"
        )
    return masks.of(names[0] if names else masks.models[0]), problems


def _start_problems(planned: PlannedMerge, given: Given) -> Iterator[str]:
    """Yield a sentence where one mask would be learned from several."""
    starts = {
        (own.masks.path, own.masks.model) if own and own.is_start else None
        for own in map(given.get, planned.learners)
    }
    if planned.settings.mask_sharing == "shared" and len(starts) > 1:
        yield (
            "parameters.mask_sharing: one mask is learned for all models, so they can't start from "
            "different ones; set `mask_sharing: per_model`"
        )


def _misfits(planned: PlannedMerge, masks: MaskSet, source: str) -> Iterator[str]:
    """Yield what of a learned mask does not fit the models, a sentence each."""
    planned_for = {
        name: tensor for name, tensor in planned_tensors(planned).items() if tensor.may_get_mask
    }
    if not any(mask.mask_name in masks for mask in planned_for.values()):
        yield (
            f"mask {source}: none of its {len(masks.names())} tensors is in this merge (it has "
            f"{', '.join(masks.names()[:2])} ...): the mask is of another model"
        )
    storage = weight_storage(planned.out_config)
    asks = "granularity" in (planned.config.parameters or {}) or bool(planned.learners)
    for _, own in masks.each():
        for name, tensor in planned_for.items():
            if tensor.mask_name not in own:
                continue
            shape = own.shape(tensor.mask_name)
            problem = mask_shape_problem(name, shape, tensor.shape, source)
            if problem:
                yield problem
                continue
            found = own.layout(tensor.mask_name).shape
            if asks and found != tensor.layout(name, storage).shape:
                yield (
                    f"parameters.granularity: {tensor.granularity} does not fit the mask {source}, "
                    f"whose entries for {name} have the shape {found}: leave granularity out, or "
                    "learn a mask anew"
                )
                return
