"""The pre-pass: a planned merge in, a mask artifact out."""

import collections
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import torch

from ..common import machine
from ..common.errors import RecipeError, raise_together
from ..common.out_of_memory import memory_for
from ..common.process_group import Processes, is_first, own_device, processes
from ..common.timing import LEARNING, phase
from ..data.held_out import HeldOut
from ..learner.checkpoints import Checkpoints, told_fingerprint
from ..learner.divergence import LearningDiverged
from ..learner.learning_folder import checkpoint_folder, learning_folder
from ..learner.learning_model import LearningModel
from ..learner.loop import step_count
from ..mask.artifact import MASKS_FILE, MaskSet
from ..mask.writing import copy_masks, without_mask, write_masks
from .construction import constructed
from .forecast import forecast
from .learning_bar import learn_with_progress
from .learning_data import SafetyData
from .messages import comparison, diverged, learned_line
from .places import File, check_room
from .plan import PlannedMerge
from .provenance import differences, learning_fingerprint, provenance, provenance_of_use, told_date

CHECKING = "checking models and data"


def mask_for(
    planned: PlannedMerge, inputs: SafetyData | MaskSet, folder: str, files: Sequence[File] = ()
) -> MaskSet:
    """Return the mask of a planned merge: the one given, the one found in ``folder``, or a new one.

    Args:
        planned: the merge.
        inputs: the mask that it was given, or what it is learned from; see ``inputs.merge_inputs``.
        folder: of the mask.
        files: what is written afterwards, for which there must be room too.

    Raises:
        RecipeError: what keeps the mask from being learned or written.
    """
    together = processes(own_device(planned.options.device))
    if isinstance(inputs, MaskSet):
        needed = [*files, ("the mask", folder, os.path.getsize(inputs.path))]
        together.first_does(lambda: check_room(needed))
        return MaskSet.open(together.first_does(lambda: _stored(planned, inputs, folder)))
    with phase(CHECKING):
        fingerprint = learning_fingerprint(planned, inputs)
        _check_agreement(planned, fingerprint, together)
    # The first process decides for all: another may see an older state of a network's disk.
    if together.first_does(lambda: _is_known(planned, folder, fingerprint)):
        together.first_does(lambda: check_room(files))
        return MaskSet.open(folder)
    return _learned_mask(planned, folder, inputs, fingerprint, together, files)


def _check_agreement(
    planned: PlannedMerge, fingerprint: dict[str, Any], together: Processes
) -> None:
    """Check that all processes would learn the same mask.

    Raises:
        RecipeError: their models or data differ.
    """
    first, *others = together.gathered([fingerprint])
    names = [str(model) for model in planned.models]
    raise_together(
        (
            f"process {number} has other {', '.join(differing)} than process 0"
            for number, other in enumerate(others, 1)
            if (differing := differences({"fingerprint": first}, other, names))
        ),
        "the processes can't learn one mask together",
    )


def _is_known(planned: PlannedMerge, folder: str, fingerprint: dict[str, Any]) -> bool:
    """Return whether a folder has the mask that would be learned; say so, or what differs.

    Raises:
        RecipeError: its mask is damaged.
    """
    if not os.path.exists(os.path.join(folder, MASKS_FILE)):
        return False
    known = MaskSet.open(folder)
    differing = differences(known.provenance, fingerprint, [str(m) for m in planned.models])
    if differing:
        _say(
            planned,
            f"somf: the mask in {folder} was learned with other {', '.join(differing)}: a new one "
            f"is learned, and the old one moves to {folder}.before",
        )
    else:
        _say(planned, f"somf: reusing the mask learned before in {folder}")
    return not differing


def learning_date(folder: str) -> str | None:
    """Return the date that a mask in ``folder``, or one begun there, was learned with.

    A chat template that writes today's date would else give other tokens, and another mask, a day
    later. None where none was.
    """
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        return told_date(MaskSet.open(folder).provenance.get("fingerprint"))
    return told_date(told_fingerprint(checkpoint_folder(folder)))


def _stored(planned: PlannedMerge, masks: MaskSet, folder: str) -> str:
    """Store given masks in a folder, unless they are those in it; return their place."""
    place = os.path.join(folder, MASKS_FILE)
    if os.path.exists(place) and os.path.samefile(place, masks.path):
        return masks.path
    aside = f"{folder}.before"
    if os.path.exists(place) and os.path.realpath(masks.path).startswith(
        os.path.realpath(aside) + os.sep
    ):
        raise RecipeError(
            f"mask {masks.path} is where the mask in {folder} would be put aside: move it to "
            "another folder first"
        )
    return copy_masks(folder, masks, provenance_of_use(planned, masks)).path


def _learned_mask(
    planned: PlannedMerge,
    folder: str,
    data: SafetyData,
    fingerprint: dict[str, Any],
    together: Processes,
    files: Sequence[File],
) -> MaskSet:
    with learning_folder(folder, together) as place, ExitStack() as ending:
        for note in data.notes:
            _say(planned, f"somf: {note}")
        cut = data.cut_told(planned.settings.max_length)
        if cut:
            _say(planned, f"somf: {cut}")
        with _stage("reading task vectors"):
            expected = forecast(planned, data, together)
            needed = [*files, *expected.files(folder)]
            together.first_does(lambda: check_room(needed))
            _say(planned, f"somf: {expected.told}")
            learning, problem, ways = constructed(planned, folder, data, expected, together, ending)
        checkpoints = Checkpoints(
            place,
            fingerprint,
            learning.masked,
            together,
            seconds=machine.checkpoint_seconds(),
        )
        progress = checkpoints.latest()
        if progress.step:
            _say(planned, f"somf: going on after step {progress.step}, kept in {place}")

        def artifact(named: str, compared: HeldOut | str, **further: Any) -> MaskSet:
            told = provenance(
                planned, data, fingerprint, progress.history, learning.masked, compared
            )
            told |= {"learned_with": ways, **further}
            return _written(named, learning, together, told, progress.history)

        try:
            quiet = planned.options.quiet or not together.is_first
            with phase(LEARNING):
                learn_with_progress(problem, progress, checkpoints, quiet)
        except LearningDiverged as error:
            # The gradients of a step are used one by one, before all of them are known.
            progress = progress if error.is_intact else checkpoints.latest()
            kept = None
            if progress.step:
                kept = together.first_does(lambda: without_mask(f"{folder}.last-good"))
                artifact(kept, "learning was stopped", stopped=error.record())
            raise RecipeError(
                diverged(planned, error, step_count(planned.settings, len(data.pairs)), kept, ways)
            ) from error
        compared: HeldOut | str = data.why_none or "nothing was learned"
        if problem.held_out and progress.step:
            with _stage("held-out pairs"):
                compared = comparison(planned, problem, quiet)
        with _stage("writing the mask"):
            masks = artifact(folder, compared)
        checkpoints.remove()
    _say(planned, f"somf: {learned_line(masks, compared)}")
    return masks


def _written(
    folder: str,
    learning: LearningModel,
    together: Processes,
    told: dict[str, Any],
    history: list[dict[str, Any]],
) -> MaskSet:
    """Return the learned mask, which the first process writes into ``folder``."""
    tensors = learning.masked
    # All processes take part where each has a share of a mask.
    probabilities = ((t.name, torch.sigmoid(t.whole())) for t in tensors)
    if not together.is_first:
        collections.deque(probabilities, maxlen=0)
        together.wait()
        return MaskSet.open(folder)
    written = write_masks(
        folder,
        probabilities,
        aliases=learning.aliases,
        repeats={t.name: (t.layout.axis, t.layout.repeat) for t in tensors if t.layout.repeat > 1},
        provenance=told,
        history=history,
    )
    together.wait()
    return written


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Time a part of the pre-pass, and name it where memory runs out in it."""
    with phase(name), memory_for(lambda: name):
        yield


def _say(planned: PlannedMerge, text: str) -> None:
    if not planned.options.quiet and is_first():
        click.echo(text, err=True)
