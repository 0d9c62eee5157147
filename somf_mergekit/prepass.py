"""The pre-pass: a planned merge in, a mask artifact out."""

import collections
import os
from contextlib import ExitStack
from typing import Any

import click
import torch

from . import machine
from .errors import RecipeError, first_line
from .forecast import forecast
from .held_out import HeldOut
from .inputs import SafetyData, checked_data, given_mask
from .learner.checkpoints import Checkpoints, Progress
from .learner.divergence import LearningDiverged
from .learner.engine import ResidentEngine
from .learner.folder import learning_folder
from .learner.interruption import LearningInterrupted, stop_requests
from .learner.layers import StreamingImpossible
from .learner.loop import StepReport, learn_logits, step_count
from .learner.mapped import MappedFiles
from .learner.model import LearningModel, Placement, learning_model
from .learner.pinned import PinnedMemory
from .learner.problem import LearningProblem
from .learner.recovery import gone_back
from .learner.streaming import StreamingEngine
from .mask_files import keep_masks, write_masks
from .masks import MASKS_FILE, MaskSet
from .outcome import comparison, diverged, learned_line, told_divergence
from .phases import LEARNING, phase
from .plan import PlannedMerge
from .processes import ALONE, Processes, is_first, own_device, processes
from .provenance import differences, learning_fingerprint, provenance, provenance_of_use
from .sources import loaded_tensors

CHECKING = "checking models and data"


def mask_for(planned: PlannedMerge, folder: str) -> MaskSet:
    """Return the mask of a planned merge: the one given, the one found in ``folder``, or a new one.

    Raises:
        RecipeError: what is wrong with the models, the data or the mask, all of it together.
    """
    settings = planned.settings
    if settings.mask:
        return _given_mask(planned, settings.mask, folder)
    _check_folder(folder)
    with phase(CHECKING):
        data = checked_data(planned)
        fingerprint = learning_fingerprint(planned, data)
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
    return _learned_mask(planned, folder, data, fingerprint)


def _given_mask(planned: PlannedMerge, source: str, folder: str) -> MaskSet:
    with phase(CHECKING):
        masks = given_mask(planned, source)
    kept = os.path.join(folder, MASKS_FILE)
    if os.path.exists(kept) and os.path.samefile(kept, masks.path):
        return masks
    _check_folder(folder)
    _make_room(folder)
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
        with phase("reading task vectors"):
            learning, problem, ways = _learning(planned, folder, data, together, ending)
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
                _learn_with_progress(problem, progress, checkpoints, quiet)
        except LearningDiverged as error:
            if not error.is_intact:
                at, good = error.step + 1, error.step
                _say(planned, f"somf: {error.what} at step {at}: going back to step {good}")
                progress = gone_back(problem, progress, checkpoints, good)
            kept = together.of_first(_free_name(f"{folder}.last-good"))
            stopped = told_divergence(error)
            artifact(kept, "learning was stopped", stopped=stopped)
            checkpoints.remove()
            raise RecipeError(
                diverged(planned, error, step_count(planned.settings, len(data.pairs)), kept, ways)
            ) from error
        compared: HeldOut | str = data.why_none or "nothing was learned"
        if problem.held_out and progress.step:
            with phase("held-out pairs"):
                compared = comparison(planned, problem, quiet)
        if together.is_first:
            _make_room(folder)
        with phase("writing the mask"):
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


def _learning(
    planned: PlannedMerge,
    folder: str,
    data: SafetyData,
    together: Processes,
    ending: ExitStack,
) -> tuple[LearningModel, LearningProblem, dict[str, Any]]:
    """Return the model that learns, what it learns from, and how: on the engine that fits.

    How a mask is learned changes its last digits alone. It is told with it, and decides nothing.
    What must be given back when learning ends is for ``ending``.
    """
    expected = forecast(planned, data, together)
    _say(planned, f"somf: {expected.told}")
    chosen = expected.engine
    device = own_device(planned.options.device)
    store = _store(device, folder) if chosen == machine.STREAMING else None
    if store:
        ending.enter_context(store)
    placement = Placement(
        device=device,
        autocast=machine.autocast_type(device),
        store=store,
        keepers=together if chosen == machine.SHARDED else ALONE,
    )
    learning = learning_model(
        planned.out_config,
        loaded_tensors(planned),
        planned.settings,
        {weight.name for weight, _ in planned.tensors if planned.may_get_mask(weight.name)},
        placement,
        planned.options.trust_remote_code,
    )
    engine = ResidentEngine if chosen == machine.RESIDENT else StreamingEngine
    try:
        runs = engine(learning.model, learning.masked, learning.fixed, placement.autocast, together)
    except StreamingImpossible as error:
        raise RecipeError(
            f"the {chosen} engine can't run this merge: {error}. The resident one can, where the "
            "memory is enough: --engine resident (SOMF_ENGINE=resident)."
        ) from error
    problem = LearningProblem(
        engine=runs,
        tensors=learning.masked,
        pairs=data.pairs,
        utility=data.utility,
        settings=planned.settings,
        micro_batch=expected.micro_batch,
        together=together,
        held_out=data.held_out,
    )
    ways = {
        "engine": expected.engine,
        "precision": str(placement.autocast or torch.float32).removeprefix("torch."),
        "device": torch.device(device).type,
        "processes": together.count,
        "micro_batch": expected.micro_batch,
    }
    return learning, problem, ways


def _store(device: str, folder: str) -> MappedFiles | PinnedMemory:
    """Return where the streaming engine keeps what it brings layer by layer."""
    if torch.device(device).type != "cpu":
        return PinnedMemory()
    # The files go beside the mask: where that goes, there is a disk with room for models.
    beside = os.path.dirname(os.path.abspath(folder))
    os.makedirs(beside, exist_ok=True)
    return MappedFiles(beside)


def _make_room(folder: str) -> None:
    """Put a mask that is in ``folder`` aside."""
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        os.replace(folder, _free_name(f"{folder}.before"))


def _learn_with_progress(
    problem: LearningProblem,
    progress: Progress,
    checkpoints: Checkpoints,
    quiet: bool,
) -> None:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def bar(name: str, total: int, **options: Any) -> Any:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=name, disable=quiet, **options)
        return bars[name]

    def on_reference(done: int, total: int) -> None:
        # Several processes can't know of each other here, and end after the first step.
        if checkpoints.stop.signal and problem.together.count == 1:
            raise LearningInterrupted(checkpoints.stop.signal, progress.step)
        reference = bar("Reference", total, unit="example", leave=False)
        reference.update(done - reference.n)
        if done == total:
            reference.close()

    def on_step(report: StepReport) -> None:
        shown = {"loss": report.loss, "accuracy": report.accuracy, "utility": report.utility}
        learning = bar("Learning mask", report.steps, unit="step", initial=report.step - 1)
        learning.set_postfix({k: f"{v:.4f}" for k, v in shown.items() if v is not None})
        learning.update()

    try:
        with stop_requests(checkpoints.stop):
            learn_logits(problem, on_step, on_reference, progress, checkpoints)
    except (MemoryError, RuntimeError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise RecipeError(
            f"the memory was not enough for step {progress.step + 1} ({first_line(error)}). What "
            "checkpoints have is kept: the same command goes on from there, also with "
            "--micro-batch-size 1 (SOMF_MICRO_BATCH_SIZE) or --engine streaming (SOMF_ENGINE), "
            "which need less."
        ) from error
    finally:
        for shown in bars.values():
            shown.close()


def _check_folder(folder: str) -> None:
    """Check that a mask can be put in ``folder`` without harm to what is there.

    Raises:
        RecipeError: it holds files, and none of them is a mask.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if found and MASKS_FILE not in found:
        raise RecipeError(f"folder {folder} holds files but no mask: name a new or an empty folder")


def _free_name(wanted: str) -> str:
    name, number = wanted, 1
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name


def _say(planned: PlannedMerge, text: str) -> None:
    if not planned.options.quiet and is_first():
        click.echo(text, err=True)
