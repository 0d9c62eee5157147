"""The pre-pass: a planned merge in, a mask artifact out."""

import collections
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import torch

from . import machine
from .construction import constructed
from .errors import RecipeError
from .forecast import forecast
from .held_out import HeldOut
from .inputs import SafetyData
from .learner.checkpoints import Checkpoints
from .learner.divergence import LearningDiverged
from .learner.folder import learning_folder
from .learner.loop import step_count
from .learner.model import LearningModel
from .learner.recovery import gone_back
from .learning_bar import learn_with_progress
from .mask_files import keep_masks, write_masks
from .mask_folder import MASKS_FILE, free_name, make_room
from .masks import MaskSet
from .out_of_memory import memory_for
from .outcome import comparison, diverged, learned_line, told_divergence
from .phases import LEARNING, phase
from .plan import PlannedMerge
from .processes import Processes, is_first, own_device, processes
from .provenance import differences, learning_fingerprint, provenance, provenance_of_use

CHECKING = "checking models and data"


def mask_for(planned: PlannedMerge, inputs: SafetyData | MaskSet, folder: str) -> MaskSet:
    """Return the mask of a planned merge: the one given, the one found in ``folder``, or a new one.

    Args:
        planned: the merge.
        inputs: the mask that it was given, or what it is learned from; see ``inputs.merge_inputs``.
        folder: of the mask.

    Raises:
        RecipeError: what keeps the mask from being learned or written.
    """
    if isinstance(inputs, MaskSet):
        return _given_mask(planned, inputs, folder)
    with phase(CHECKING):
        fingerprint = learning_fingerprint(planned, inputs)
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        known = MaskSet.open(folder)
        differing = differences(known.provenance, fingerprint, [str(m) for m in planned.models])
        if not differing:
            _say(planned, f"somf: reusing the mask learned before in {folder}")
            return known
        _say(
            planned,
            f"somf: the mask in {folder} was learned with other {', '.join(differing)}: a new one "
            "is learned, and the old one kept beside it",
        )
    return _learned_mask(planned, folder, inputs, fingerprint)


def _given_mask(planned: PlannedMerge, masks: MaskSet, folder: str) -> MaskSet:
    kept = os.path.join(folder, MASKS_FILE)
    if os.path.exists(kept) and os.path.samefile(kept, masks.path):
        return masks
    make_room(folder)
    return keep_masks(folder, masks, provenance_of_use(planned, masks))


def _learned_mask(
    planned: PlannedMerge, folder: str, data: SafetyData, fingerprint: dict[str, Any]
) -> MaskSet:
    # All have looked at the folder before the first one writes there.
    together = processes(own_device(planned.options.device))
    together.wait()
    with learning_folder(folder, together) as place, ExitStack() as ending:
        if data.dropped:
            _say(planned, f"somf: rows of the safety dataset left out: {data.dropped}")
        with _stage("reading task vectors"):
            expected = forecast(planned, data, together)
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
            if not error.is_intact:
                at, good = error.step + 1, error.step
                _say(planned, f"somf: {error.what} at step {at}: going back to step {good}")
                progress = gone_back(problem, progress, checkpoints, good)
            kept = together.of_first(free_name(f"{folder}.last-good"))
            stopped = told_divergence(error)
            artifact(kept, "learning was stopped", stopped=stopped)
            checkpoints.remove()
            raise RecipeError(
                diverged(planned, error, step_count(planned.settings, len(data.pairs)), kept, ways)
            ) from error
        compared: HeldOut | str = data.why_none or "nothing was learned"
        if problem.held_out and progress.step:
            with _stage("held-out pairs"):
                compared = comparison(planned, problem, quiet)
        if together.is_first:
            make_room(folder)
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
    probabilities = ((t.name, torch.sigmoid(t.whole_logits())) for t in tensors)
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
