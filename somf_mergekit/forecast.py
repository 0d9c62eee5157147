"""What learning a mask takes on this machine, and so which engine runs it: told from headers."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from . import machine
from .errors import RecipeError
from .granularity import mask_layout, weight_storage
from .headers import planned_tensors
from .inputs import SafetyData
from .learner.loop import step_count
from .plan import PlannedMerge

RESIDENT, STREAMING = "resident", "streaming"
# What a forecast leaves to the rest of the system, and to what it does not know.
_USABLE_SHARE = 0.9
_LOGIT_BYTES = 4
_GIB = 1 << 30
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Forecast:
    """What learning a recipe's mask would take: told without loading weights.

    Attributes:
        tensors: tensors that may get a mask.
        entries: mask entries of all of them.
        pairs: preference pairs.
        steps: optimiser steps.
        engine: ``resident`` or ``streaming``.
        micro_batch: pairs that go through the model at once.
        memory: bytes, with those of activations.
        free: bytes that can be had.
    """

    tensors: int
    entries: int
    pairs: int
    steps: int
    engine: str
    micro_batch: int
    memory: int
    free: int

    @property
    def told(self) -> str:
        """The engine and its need in a line."""
        return f"{self.engine}: needs about {_gib(self.memory)} of {_gib(self.free)} GiB free"


def forecast(planned: PlannedMerge, data: SafetyData) -> Forecast:
    """Return what learning the mask of a recipe would take.

    Raises:
        RecipeError: no engine fits in what is free, or the one asked for can't run.
    """
    settings, device = planned.settings, planned.options.device or "cpu"
    free = machine.free_memory(device)
    tensors = planned_tensors(planned)
    weights = _weight_bytes(planned)
    text = planned.out_config.get_text_config()
    pair = 2 * settings.max_length * machine.activation_bytes(planned.out_config)
    # Between layers the hidden states of a whole step's pairs are kept.
    states = 8 * settings.max_length * settings.batch_size
    states *= text.hidden_size * text.num_hidden_layers
    usable = int(_USABLE_SHARE * free)
    needs = {
        RESIDENT: (weights[RESIDENT], pair),
        STREAMING: (weights[STREAMING] + states, pair // text.num_hidden_layers),
    }
    chosen = machine.machine_setting("engine")
    on_cpu = device == "cpu"
    if chosen == STREAMING and not on_cpu:
        raise RecipeError(f"the streaming engine runs on the CPU, not on {device}")
    possible = [RESIDENT, STREAMING] if on_cpu else [RESIDENT]
    fitting = [name for name in possible if sum(needs[name]) <= usable]
    if not chosen and not fitting:
        raise RecipeError(_does_not_fit({name: sum(needs[name]) for name in possible}, free))
    engine = chosen or fitting[0]
    kept, activations = needs[engine]
    # At most half of what is free: larger micro-batches save little time.
    room = min(usable - kept, free // 2)
    micro_batch = machine.micro_batch_pairs(settings.batch_size, activations, room)
    storage = weight_storage(planned.out_config)
    masked = {name: tensor for name, tensor in tensors.items() if tensor.may_get_mask}
    entries = sum(
        math.prod(mask_layout(tensor.granularity, name, tensor.shape, storage).shape)
        for name, tensor in masked.items()
    )
    return Forecast(
        tensors=len(masked),
        entries=entries,
        pairs=len(data.pairs),
        steps=step_count(settings, len(data.pairs)),
        engine=engine,
        micro_batch=micro_batch,
        memory=kept + micro_batch * activations,
        free=free,
    )


def _weight_bytes(planned: PlannedMerge) -> dict[str, int]:
    """Return the bytes, beside activations, that each engine has in memory."""
    autocast = machine.autocast_type(planned.options.device or "cpu")
    computed = autocast.itemsize if autocast else 4
    stored = 2 if planned.config.dtype in ("float16", "bfloat16") else 4
    storage = weight_storage(planned.out_config)
    resident, outside = 0, 0
    layers: Counter[str] = Counter()
    for name, tensor in planned_tensors(planned).items():
        size = math.prod(tensor.shape)
        # Embeddings stay float32 under autocast.
        in_model = size * (4 if tensor.has_vocabulary else computed)
        kept = size * stored
        if tensor.may_get_mask:
            in_model *= 2  # with the gradient
            linear = tensor.kept_tensors == 1
            kept += size * (computed if linear else tensor.kept_tensors * stored)
            layout = mask_layout(tensor.granularity, name, tensor.shape, storage)
            kept += _LOGIT_BYTES * math.prod(layout.shape)
        resident += in_model + kept
        layer = _LAYER.match(name)
        if layer:
            layers[layer[1]] += in_model
        else:
            outside += in_model
    return {RESIDENT: resident, STREAMING: outside + max(layers.values(), default=0)}


def _does_not_fit(needs: dict[str, int], free: int) -> str:
    told = ", ".join(f"{name} needs about {_gib(need)} GiB" for name, need in needs.items())
    return (
        f"learning this mask does not fit in memory: {told}, {_gib(free)} GiB are free. What "
        "helps: a coarser granularity, fewer masked tensors (include, exclude), a smaller "
        "max_length or batch_size, or a mask learned elsewhere (mask)."
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"
