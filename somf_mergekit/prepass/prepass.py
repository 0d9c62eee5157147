"""The pre-pass: a planned merge in, a mask artifact out."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from ..common.errors import RecipeError, raise_together
from ..common.machine import memory_for
from ..common.process_group import Processes, is_first, own_device, processes
from ..common.timing import LEARNING, Timer
from ..data.held_out import HeldOut
from ..learner.checkpoints import (
    Checkpoints,
    checkpoint_folder,
    learning_folder,
    newest_fingerprint,
)
from ..learner.looks import outcome
from ..learner.loop import step_count
from ..learner.stopping import LearningDiverged
from ..learner.tensors import set_masks
from ..mask.artifact import MaskSet
from ..mask.artifact_files import MASKS_FILE
from ..mask.writing import without_mask
from .forecast import forecast
from .learning_data import MaskInputs
from .mask_storing import content_of, stored_masks, written_masks
from .places import File, check_room
from .plan import PlannedMerge
from .provenance import (
    VALIDATION,
    differences,
    learning_fingerprint,
    provenance,
    recorded_date,
)
from .training import comparison, diverged, learned_line, train, training_setup

CHECKING = "checking models and data"


def mask_for(
    planned: PlannedMerge,
    inputs: MaskInputs,
    folder: str,
    files: Sequence[File] = (),
    timer: Timer | None = None,
) -> MaskSet:
    """Return the mask of a planned merge: the one given, the one found in ``folder``, or a new one.

    Args:
        planned: the merge.
        inputs: the masks that it was given, and what others are learned from.
        folder: of the mask.
        files: what is written afterwards, for which there must be room too.
        timer: gets the seconds of each phase.

    Raises:
        RecipeError: what keeps the mask from being learned or written.
    """
    group = processes(own_device(planned.options.device))
    if inputs.data is None:
        paths = {own.masks.path for own in inputs.given.values()}
        needed = [*files, ("the mask", folder, sum(map(os.path.getsize, paths)))]
        group.first_does(lambda: check_room(needed))
        return MaskSet.open(group.first_does(lambda: stored_masks(planned, inputs.given, folder)))
    timer = Timer() if timer is None else timer
    with timer.phase(CHECKING):
        fingerprint = learning_fingerprint(planned, inputs.data, inputs.given)
        _check_agreement(planned, fingerprint, group)
    # The first process decides for all: another may see an older state of a network's disk.
    if group.first_does(lambda: _is_known(planned, folder, fingerprint)):
        group.first_does(lambda: check_room(files))
        return MaskSet.open(folder)
    return _learned_mask(planned, folder, inputs, fingerprint, group, files, timer)


def learning_date(folder: str) -> str | None:
    """Return the date that a mask in ``folder``, or one begun there, was learned with, if any.

    A chat template that writes today's date would else give other tokens, and another mask, a day
    later.
    """
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        return recorded_date(MaskSet.open(folder).provenance.get("fingerprint"))
    return recorded_date(newest_fingerprint(checkpoint_folder(folder)))


def _check_agreement(planned: PlannedMerge, fingerprint: dict[str, Any], group: Processes) -> None:
    """Check that all processes would learn the same mask.

    Raises:
        RecipeError: their models or data differ.
    """
    first, *others = group.gathered([fingerprint])
    names = [str(model) for model in planned.models]
    found = [differences({"fingerprint": first}, other, names) for other in others]
    raise_together(
        (
            f"process {number} has other {', '.join(differing)} than process 0"
            for number, differing in enumerate(found, 1)
            if differing
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


def _learned_mask(
    planned: PlannedMerge,
    folder: str,
    inputs: MaskInputs,
    fingerprint: dict[str, Any],
    group: Processes,
    files: Sequence[File],
    timer: Timer,
) -> MaskSet:
    data, given = inputs.data, inputs.given
    assert data is not None
    with learning_folder(folder, group) as place, ExitStack() as ending:
        for note in filter(None, [*data.notes, data.cut_text(planned.settings.max_length)]):
            _say(planned, f"somf: {note}")
        with _stage(timer, "reading task vectors"):
            expected = forecast(planned, data, group)
            needed = [*files, *expected.files(folder)]
            group.first_does(lambda: check_room(needed))
            _say(planned, f"somf: {expected.line}")
            learning, setup, ways = training_setup(planned, folder, inputs, expected, group, ending)
        minutes = planned.options.machine.checkpoint_minutes
        checkpoints = Checkpoints(place, fingerprint, learning.masked, group, seconds=60 * minutes)
        progress = checkpoints.latest()
        if progress.step:
            _say(planned, f"somf: going on after step {progress.step}, stored in {place}")

        def artifact(named: str, compared: HeldOut | str, **further: Any) -> MaskSet:
            history = progress.history
            record = provenance(
                planned, data, fingerprint, history, learning.masked, compared, given
            )
            record |= {"learned_with": ways, **further}
            content = None
            if given or len(planned.learned(planned.models)) > 1:
                content = content_of(planned, given)
            return written_masks(named, learning, group, record, history, content)

        quiet = planned.options.quiet or not group.is_first
        try:
            with timer.phase(LEARNING):
                train(setup, progress, checkpoints, quiet)
        except LearningDiverged as error:
            # The gradients of a step are used one by one, before all of them are known.
            progress = progress if error.is_intact else checkpoints.latest()
            stored = None
            if progress.step:
                stored = group.first_does(lambda: without_mask(f"{folder}.last-good"))
                artifact(stored, "learning was stopped", stopped=error.record())
            steps = step_count(planned.settings, len(data.pairs))
            raise RecipeError(diverged(planned, error, steps, stored, ways)) from error
        compared: HeldOut | str = data.why_none or "nothing was learned"
        if data.held_out and progress.step:
            with _stage(timer, "held-out pairs"):
                if expected.exact:
                    masked = learning.masked
                    # Both bases may not fit beside each other.
                    del learning, setup
                    gc.collect()
                    learning, setup, _ = training_setup(
                        planned, folder, inputs, expected.exact, group, ending
                    )
                    set_masks(learning.masked, masked)
                compared = comparison(planned, setup, quiet)
        with _stage(timer, "writing the mask"):
            chosen = outcome(progress.history, planned.settings.patience)
            chosen = chosen and {VALIDATION: {"pairs": len(data.validation), **chosen}}
            masks = artifact(folder, compared, **chosen)
        checkpoints.remove()
    _say(planned, f"somf: {learned_line(masks, compared)}")
    return masks


@contextmanager
def _stage(timer: Timer, name: str) -> Iterator[None]:
    """Time a part of the pre-pass, and name it where memory runs out in it."""
    with timer.phase(name), memory_for(lambda: name):
        yield


def _say(planned: PlannedMerge, text: str) -> None:
    if not planned.options.quiet and is_first():
        click.echo(text, err=True)
