"""The learning loop: sample the mask, run the pairs, turn weight gradients into logit updates."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..recipe.settings import Settings
from .checkpoint_file import Progress
from .checkpoints import Checkpoints
from .looks import LOOK, Look, Looks, choice, has_ended
from .passes import Passes
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step showed, on its own pairs and under its own sample of the mask.

    Attributes:
        step, steps: its number, counted from 1, and how many there are.
        loss: the objective's, without the utility term.
        accuracy: share of pairs with a positive margin; None where the objective has no margin.
        margin: mean reward margin; None likewise.
        utility: mean divergence from the unmasked merge; None without a utility term.
        multiplier: of the learning rate, from 0 to 1.
        seconds: that it took, without the look.
        look: at the mask after it; None where there was none.
    """

    step: int
    steps: int
    loss: float
    accuracy: float | None
    margin: float | None
    utility: float | None
    multiplier: float
    seconds: float
    look: Look | None = None

    def row(self) -> dict[str, Any]:
        """Return the step as a row of the training history, under the names of its columns."""
        row = asdict(self)
        # The name of this column in the training history of older masks too.
        row["rate_share"] = row.pop("multiplier")
        if self.look is None:
            del row[LOOK]
        return row


def step_count(settings: Settings, pairs: int) -> int:
    """Return the optimiser steps of a recipe with that many pairs."""
    steps = settings.epochs * math.ceil(pairs / settings.batch_size)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_multiplier(step: int, steps: int, warmup_share: float) -> float:
    """Return what a step multiplies the learning rate with: linear warm-up, half a cosine to 0.

    Args:
        step: its number, from 0.
        steps: of the whole schedule.
        warmup_share: of these steps; the peak is at the first step where it is 0.
    """
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def batches(examples: int, settings: Settings, steps: int, purpose: str = "") -> list[list[int]]:
    """Return the indices of each step's examples; later epochs come in orders of their own."""
    order, epoch = list(range(examples)), 0
    plan = []
    for _ in range(steps):
        if not order:
            epoch += 1
            order = list(range(examples))
            random.Random(f"{settings.seed}/{purpose}{epoch}").shuffle(order)
        plan.append(order[: settings.batch_size])
        order = order[settings.batch_size :]
    return plan


def learn_logits(
    setup: TrainingSetup,
    on_step: Callable[[StepReport], None],
    on_reference: Callable[[int, int], None],
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Learn the logits of ``setup.tensors`` in place.

    With validation pairs, learning ends before its last step where looks at the mask say so, and
    the logits are in the end those of the mask that these have kept.

    Args:
        setup: see TrainingSetup.
        on_step: called after each optimiser step.
        on_reference: called while log-probabilities to compare with are computed, with the number
            of examples that are done and of all.
        progress: how far learning had come when it was stopped; updated.
        checkpoints: where what is done is stored; nowhere if not given, and the logits then stay
            those of the last step.

    Raises:
        LearningDiverged: a loss or a gradient is not finite.
        LearningInterrupted: the process was asked to end.
        RecipeError: a checkpoint can't be written, or the kept mask can't be read.
    """
    progress = progress or Progress()
    settings = setup.settings
    steps = step_count(settings, len(setup.pairs))
    if steps == 0:
        return
    schedule = max(steps, settings.schedule_steps or 0)
    plan = batches(len(setup.pairs), settings, steps)
    has_utility = setup.utility and settings.utility_weight > 0
    utility_plan = batches(len(setup.utility), settings, steps, "utility/") if has_utility else []
    passes = Passes(setup, progress)
    passes.compare(_used(setup, plan), _used(setup, utility_plan), on_reference)
    looks = Looks(setup) if setup.validation else None
    for step, batch in enumerate(plan):
        if step < progress.step:
            continue
        if has_ended(progress.history, settings.patience):
            break
        start = time.perf_counter()
        multiplier = learning_rate_multiplier(step, schedule, settings.warmup)
        shown = passes.learn(batch, utility_plan[step] if has_utility else [], step, multiplier)
        margins = shown.margins
        seconds = time.perf_counter() - start
        is_look_due = (step + 1) % settings.look_every == 0 or step + 1 == steps
        report = StepReport(
            step=step + 1,
            steps=steps,
            loss=shown.loss,
            accuracy=sum(m > 0 for m in margins) / len(margins) if margins else None,
            margin=sum(margins) / len(margins) if margins else None,
            utility=shown.utility,
            multiplier=multiplier,
            seconds=seconds,
            look=looks.look() if looks and is_look_due else None,
        )
        progress.step = step + 1
        progress.history.append(report.row())
        on_step(report)
        if checkpoints:
            is_last = step + 1 == steps or has_ended(progress.history, settings.patience)
            checkpoints.after_step(progress, is_last=is_last)
    kept = choice(progress.history).step
    if checkpoints and kept not in (0, progress.step):
        checkpoints.go_back(kept)


def _used(setup: TrainingSetup, plan: list[list[int]]) -> list[int]:
    """Return the rows that this process comes across."""
    return sorted(set().union(*map(setup.process_group.share, plan)))
