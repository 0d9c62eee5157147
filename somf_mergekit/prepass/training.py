"""Training a mask: on the engine that fits, with a progress bar, and what came of it in words."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..common import machine
from ..common.errors import RecipeError
from ..common.machine import memory_for
from ..common.process_group import ALONE, Processes, own_device
from ..data.held_out import HeldOut
from ..learner.checkpoint_file import Progress
from ..learner.checkpoints import Checkpoints
from ..learner.engine import ResidentEngine
from ..learner.factored import recompute_layers
from ..learner.few_bits import precision_text
from ..learner.layered import StreamingImpossible
from ..learner.learning_model import LearningModel, Placement, learning_model
from ..learner.loop import StepReport, learn_logits
from ..learner.parts import Content
from ..learner.stopping import LearningDiverged, LearningInterrupted, stop_requests
from ..learner.stores import MappedFiles, PinnedMemory, Store
from ..learner.streaming import StreamingEngine
from ..learner.training_setup import TrainingSetup, pair_margins
from ..mask.artifact import MaskSet
from ..mask.census import MaskCensus
from .factored_tensors import factored_tensors
from .forecast import Forecast
from .learning_data import MaskInputs
from .plan import PlannedMerge
from .provenance import VALIDATION, recorded_settings
from .task_vectors import loaded_tensors

# Rows, or tensors, that are named.
_NAMED = 5


def training_setup(
    planned: PlannedMerge,
    folder: str,
    inputs: MaskInputs,
    expected: Forecast,
    group: Processes,
    ending: ExitStack,
) -> tuple[LearningModel, TrainingSetup, dict[str, Any]]:
    """Return the model that learns, what it learns from, and how: on the engine that fits.

    How a mask is learned changes its last digits alone: it is recorded, and decides nothing.

    Args:
        planned: the recipe.
        folder: where the mask will be put.
        inputs: its data, and the masks that it was given.
        expected: its forecast, with the engine.
        group: this process among those that learn.
        ending: gives back, when learning ends, what must be given back.

    Raises:
        RecipeError: the engine can't run the merge, or something is wrong with the models.
    """
    options, chosen, data = planned.options, expected.engine, inputs.data
    assert data is not None
    device = own_device(options.device)
    store = weight_store(device, folder) if chosen == machine.STREAMING else None
    if isinstance(store, PinnedMemory):
        ending.enter_context(store)
    placement = Placement(
        device=device,
        autocast=machine.autocast_type(device, options.machine.precision),
        store=store,
        shard_group=group if chosen == machine.SHARDED else ALONE,
        is_factored=chosen == machine.FACTORED,
        few_bits=expected.few_bits,
    )
    if expected.changes is None:
        loaded = loaded_tensors(planned, inputs.given)
    else:
        loaded = factored_tensors(planned, inputs.given, expected.changes)
    learning = learning_model(
        planned.out_config,
        loaded,
        planned.settings,
        {weight.name for weight, _ in planned.text_tensors if planned.may_get_mask(weight.name)},
        placement,
        options.trust_remote_code,
    )
    if expected.recomputes:
        recompute_layers(learning.model)
    is_whole = chosen in (machine.RESIDENT, machine.FACTORED)
    engine = ResidentEngine if is_whole else StreamingEngine
    try:
        runs = engine(learning.model, learning.masked, learning.fixed, placement.autocast, group)
    except StreamingImpossible as error:
        raise RecipeError(
            f"the {chosen} engine can't run this merge: {error}. The resident one can, where the "
            "memory is enough: --engine resident (SOMF_ENGINE=resident)."
        ) from error
    setup = TrainingSetup(
        engine=runs,
        tensors=learning.masked,
        pairs=data.pairs,
        utility=data.utility,
        settings=planned.settings,
        micro_batch=expected.micro_batch,
        process_group=group,
        held_out=data.held_out,
        validation=data.validation,
    )
    ways = {
        "engine": chosen,
        "precision": str(placement.autocast or torch.float32).removeprefix("torch."),
        "device": torch.device(device).type,
        "processes": group.count,
        "micro_batch": expected.micro_batch,
    }
    if expected.few_bits:
        ways["base_precision"] = expected.few_bits.precision
    return learning, setup, ways


def weight_store(device: str, folder: str) -> Store:
    """Return where the streaming engine has what it brings layer by layer: beside the mask, or
    beside the GPU.
    """
    if torch.device(device).type != "cpu":
        return PinnedMemory(torch.device(device))
    # Where the mask goes, there is a disk with room for models.
    beside = os.path.dirname(os.path.abspath(folder))
    os.makedirs(beside, exist_ok=True)
    return MappedFiles(beside)


def train(setup: TrainingSetup, progress: Progress, checkpoints: Checkpoints, quiet: bool) -> None:
    """Learn, with a progress bar, from where ``progress`` is.

    Args:
        setup: what is learned; its logits are changed in place.
        progress: the steps done before; changed in place.
        checkpoints: take what is learned every few minutes.
        quiet: show no bar.

    Raises:
        RecipeError: memory runs out.
        LearningInterrupted, LearningDiverged: as of ``learn_logits``.
    """
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def bar(name: str, total: int, **options: Any) -> Any:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=name, disable=quiet, **options)
        return bars[name]

    def on_reference(done: int, total: int) -> None:
        # Several processes can't know of each other here, and end after the first step.
        if checkpoints.stop.signal and setup.process_group.count == 1:
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
        with stop_requests(checkpoints.stop), memory_for(lambda: f"step {progress.step + 1}"):
            learn_logits(setup, on_step, on_reference, progress, checkpoints)
    finally:
        for shown in bars.values():
            shown.close()


def comparison(planned: PlannedMerge, setup: TrainingSetup, quiet: bool) -> HeldOut:
    """Return how the held-out pairs compare the merge under the learned mask with one without.

    Args:
        planned: the merge.
        setup: what was learned from.
        quiet: show no bar.
    """
    from tqdm import tqdm

    count = 2 * len(setup.process_group.share(list(range(len(setup.held_out)))))
    with tqdm(total=count, desc="Held-out pairs", unit="pair", leave=False, disable=quiet) as bar:
        plain, merged = (
            pair_margins(setup, setup.held_out, content, bar.update)
            for content in (Content.UNMASKED, Content.MERGED)
        )
    return HeldOut.of(plain, merged, recorded_settings(planned)["mask_kind"])


def learned_line(masks: MaskSet, compared: HeldOut | str) -> str:
    """Return what came of learning in a line.

    Args:
        masks: that were learned.
        compared: what the held-out pairs say, or why they say nothing.
    """
    steps = masks.provenance["steps"]
    precision = masks.provenance["learned_with"].get("base_precision")
    where = f" on a base in {precision_text(precision)}" if precision else ""
    parts = [f"learned in {steps:,} steps{where}"]
    chosen = masks.provenance.get(VALIDATION)
    if chosen:
        parts += [f"the mask is that of step {chosen['mask_step']:,}: {chosen['why_ended']}"]
    parts += [f"no held-out pairs: {compared}" if isinstance(compared, str) else compared.line]
    for model, own in masks.each():
        collapses = MaskCensus(own).collapses()
        tensors = {name for collapse in collapses for name in collapse.tensors}
        if steps and tensors:
            ways = ", ".join(f"{c.what} {len(c.tensors):,}" for c in collapses)
            whose = f"{model}: " if model else ""
            parts += [
                f"{whose}the masks of {len(tensors):,} of {len(own.names()):,} tensors have "
                f"collapsed ({ways})"
            ]
    return "; ".join(parts)


def diverged(
    planned: PlannedMerge,
    error: LearningDiverged,
    steps: int,
    stored: str | None,
    ways: Mapping[str, Any],
) -> str:
    """Return why learning stopped, where the mask is stored, and what to change.

    Args:
        planned: the merge.
        error: what is known.
        steps: of the whole training run.
        stored: the folder of the last mask without a fault; None where there is none.
        ways: how the mask was learned, as recorded with it.
    """
    settings = recorded_settings(planned)
    what = f"{error.what} at step {error.step + 1} of {steps}"
    for term, rows, source in (
        ("loss", error.rows, settings["safety_dataset"]),
        ("utility term", error.utility_rows, settings["utility_dataset"]),
    ):
        if rows:
            what += f"; the {term} on row {_listed(rows)} of {source} (counted from 0)"
    if error.tensors:
        what += f", that of {_listed(error.tensors)}"
    if stored:
        what += f". The last good mask is stored in {stored}"
    changes = []
    if error.rows or error.utility_rows:
        changes.append("look at these rows, and leave them out if they are not what they should be")
    changes.append(f"a smaller learning_rate (now {settings['learning_rate']})")
    if ways["precision"] != "float32":
        changes.append(f"--precision float32 (SOMF_PRECISION) instead of {ways['precision']}")
    if planned.config.dtype == "float16":
        changes.append("dtype: bfloat16 or float32")
    if settings["mask_rescale"] == "mean":
        changes.append("mask_rescale: none (a mask that is next to empty is divided by its mean)")
    return f"{what}. What to try: {'; '.join(changes)}."


def _listed(items: Sequence[Any]) -> str:
    further = len(items) - _NAMED
    return ", ".join(map(str, items[:_NAMED])) + (f" and {further:,} more" if further > 0 else "")
