"""Masks of a merge are stored: learned ones, and such as the recipe gives, put together."""

import collections
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import RecipeError
from ..common.process_group import Processes
from ..learner.learning_model import LearningModel
from ..mask.artifact import MaskSet
from ..mask.artifact_files import MASKS_FILE
from ..mask.file_content import FileContent
from ..mask.format import stored_name
from ..mask.granularity import Layout
from ..mask.writing import copy_masks, write_masks
from .given_masks import Given, is_one_for_all
from .plan import PlannedMerge
from .provenance import provenance_of_use


def stored_masks(planned: PlannedMerge, given: Given, folder: str) -> str:
    """Store given masks in a folder, unless they are those in it; return their place."""
    place = os.path.join(folder, MASKS_FILE)
    aside = os.path.realpath(f"{folder}.before")
    paths = {own.masks.path for own in given.values()} if os.path.exists(place) else set()
    here = [path for path in paths if os.path.samefile(place, path)]
    if here and len(paths) == 1 and _are_all_of_merge(planned, given):
        return here[0]
    in_the_way = [*here, *(p for p in paths if os.path.realpath(p).startswith(aside + os.sep))]
    if in_the_way:
        raise RecipeError(
            f"mask {in_the_way[0]} is in {os.path.dirname(in_the_way[0])}, which is put aside or "
            "replaced by the masks of this merge: move it to another place, and name it there"
        )
    record = provenance_of_use(planned, given)
    if is_one_for_all(planned, given):
        masks = next(iter(given.values())).masks
        return copy_masks(folder, masks, {**record, "origin": masks.provenance}).path
    content = content_of(planned, given)
    written = write_masks(folder, (), aliases={}, provenance=record, history=[], content=content)
    return written.path


def _are_all_of_merge(planned: PlannedMerge, given: Given) -> bool:
    """Return whether an artifact that all are from is what this merge would store."""
    masks = next(iter(given.values())).masks
    named = {str(model): own.masks.model for model, own in given.items()}
    return is_one_for_all(planned, given) or all(
        named.get(model) == model for model in (*named, *masks.models)
    )


def content_of(planned: PlannedMerge, given: Given) -> FileContent:
    """Return the masks of models that have one, as they were given, to be stored together."""
    models = [m for m in planned.models if m in given or m in planned.learners]
    content = FileContent(sorted(map(str, models)))
    for model, own in given.items():
        if not own.is_start:
            content.copy(own.masks, content.models.index(str(model)))
    return content


def written_masks(
    folder: str,
    learning: LearningModel,
    group: Processes,
    record: dict[str, Any],
    history: list[dict[str, Any]],
    content: FileContent | None,
) -> MaskSet:
    """Return the learned mask, which the first process writes into ``folder``.

    Where models have masks of their own, ``content`` has those that were not learned.
    """
    aliases: dict[str, str] = {}
    layouts: dict[str, Layout] = {}

    def stored(name: str, models: Sequence[Any]) -> str:
        """Return under which name a mask is stored, and let its further names be aliases."""
        numbers = [content.models.index(str(m)) for m in models] if content else [None]
        for alias in (name, *(a for a, of in learning.aliases.items() if of == name)):
            for number in numbers:
                own = stored_name(alias, number)
                if own != stored_name(name, numbers[0]):
                    aliases[own] = stored_name(name, numbers[0])
        return stored_name(name, numbers[0])

    def probabilities() -> Iterator[tuple[str, Tensor]]:
        for tensor in learning.masked:
            # All processes take part where each has a share of a mask.
            for models, logits in tensor.wholes():
                name = stored(tensor.name, models)
                layouts[name] = tensor.layout
                yield name, torch.sigmoid(logits)

    if group.is_first:
        write_masks(
            folder,
            probabilities(),
            aliases=aliases,
            layouts=layouts,
            provenance=record,
            history=history,
            content=content,
        )
    else:
        collections.deque(probabilities(), maxlen=0)
    group.wait()
    return MaskSet.open(folder)
