"""What a mask is learned with: the model, on the engine that fits, and the problem it solves."""

import os
from contextlib import ExitStack
from typing import Any

import torch

from ..common import machine
from ..common.errors import RecipeError
from ..common.process_group import ALONE, Processes, own_device
from ..learner.engine import ResidentEngine
from ..learner.layers import StreamingImpossible
from ..learner.learning_model import LearningModel, Placement, learning_model
from ..learner.mapped import MappedFiles
from ..learner.pinned import PinnedMemory
from ..learner.problem import LearningProblem
from ..learner.streaming import StreamingEngine
from .forecast import Forecast
from .learning_data import SafetyData
from .plan import PlannedMerge
from .task_vectors import loaded_tensors


def constructed(
    planned: PlannedMerge,
    folder: str,
    data: SafetyData,
    expected: Forecast,
    together: Processes,
    ending: ExitStack,
) -> tuple[LearningModel, LearningProblem, dict[str, Any]]:
    """Return the model that learns, what it learns from, and how: on the engine that fits.

    How a mask is learned changes its last digits alone. It is told with it, and decides nothing.

    Args:
        planned: the recipe.
        folder: where the mask will be put.
        data: its data.
        expected: its forecast, with the engine.
        together: this process among those that learn.
        ending: gives back, when learning ends, what must be given back.

    Raises:
        RecipeError: the engine can't run the merge, or something is wrong with the models.
    """
    chosen = expected.engine
    device = own_device(planned.options.device)
    store = _store(device, folder) if chosen == machine.STREAMING else None
    if isinstance(store, PinnedMemory):
        ending.enter_context(store)
    placement = Placement(
        device=device,
        autocast=machine.autocast_type(device, planned.options.machine.precision),
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
        return PinnedMemory(torch.device(device))
    # The files go beside the mask: where that goes, there is a disk with room for models.
    beside = os.path.dirname(os.path.abspath(folder))
    os.makedirs(beside, exist_ok=True)
    return MappedFiles(beside)
