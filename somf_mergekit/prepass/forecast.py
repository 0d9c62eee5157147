"""What learning a mask takes on this machine, and so which engine runs it: read off headers."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache

from ..common import machine
from ..common.errors import RecipeError
from ..common.machine import FACTORED, RESIDENT, SHARDED, STREAMING
from ..common.process_group import ALONE, Processes, own_device
from ..learner.checkpoints import GENERATIONS
from ..learner.loop import step_count
from ..mask.granularity import weight_storage
from .factored_tensors import Changes, changes_or_why
from .headers import PlannedTensor, planned_tensors, tensor_shapes
from .learning_data import SafetyData
from .places import File, weight_bytes
from .plan import PlannedMerge

# What a forecast leaves to the rest of the system, and to what it does not know.
_USABLE_SHARE = 0.9
_LOGIT_BYTES = 4
_GIB = 1 << 30
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Forecast:
    """What learning a recipe's mask would take: known without loading weights of whole models.

    Attributes:
        tensors: tensors that may get a mask.
        entries: mask entries of all of them.
        pairs: preference pairs.
        steps: optimiser steps, at most.
        checkpoints: that are on the disk at once, at most.
        engine: one of ``machine.ENGINES``.
        micro_batch: pairs that go through the model at once.
        memory: bytes of a process, with those of activations.
        free: bytes that each process can have.
        disk: bytes of files while learning.
        host: bytes of the host's memory that a process holds for its GPU.
        free_host: bytes of it that each process can have.
        changes: of the adapters, with the factored engine; None with others.
        why_dense: why adapters are multiplied out; empty where they aren't, or it was asked for.
    """

    tensors: int
    entries: int
    pairs: int
    steps: int
    checkpoints: int
    engine: str
    micro_batch: int
    memory: int
    free: int
    disk: int
    host: int
    free_host: int
    changes: Changes | None = None
    why_dense: str = ""

    @property
    def line(self) -> str:
        """The engine and its need."""
        line = f"{self.engine}: needs about {_gib(self.memory)} of {_gib(self.free)} GiB free"
        if self.host:
            line += f", and {_gib(self.host)} of {_gib(self.free_host)} GiB beside the GPU"
        line += f", and {_gib(self.disk)} GiB of disk" if self.disk else ""
        return line + (f"; adapters are multiplied out: {self.why_dense}" if self.why_dense else "")

    def files(self, folder: str) -> list[File]:
        """Return what learning writes into the mask's folder or beside it, see ``check_room``."""
        return [
            ("the mask", folder, self.entries),
            ("checkpoints", folder, _LOGIT_BYTES * self.entries * self.checkpoints),
            ("weights while learning", folder, self.disk),
        ]


def forecast(planned: PlannedMerge, data: SafetyData, group: Processes = ALONE) -> Forecast:
    """Return what learning the mask of a recipe would take: the same for all processes.

    Args:
        planned: the recipe.
        data: its data.
        group: this process among those that learn.

    Raises:
        RecipeError: no engine fits in what is free, or the one asked for can't run.
    """
    changes, why_dense = changes_or_why(planned)
    settings, device = planned.settings, own_device(planned.options.device)
    chosen = planned.options.machine
    free = min(group.gathered([machine.free_memory(device)]))
    on_cpu = device == "cpu"
    free_host = free if on_cpu else min(group.gathered([machine.free_memory("cpu")]))
    autocast = machine.autocast_type(device, chosen.precision)
    of_text = {weight.name for weight, _ in planned.text_tensors}
    tensors = {n: t for n, t in planned_tensors(planned).items() if n in of_text}
    storage = weight_storage(planned.out_config)
    entries = {
        name: tensor.masks * math.prod(tensor.layout(name, storage).shape)
        for name, tensor in tensors.items()
        if tensor.may_get_mask and tensor.masks
    }
    computed = autocast.itemsize if autocast else 4
    needs = _engine_needs(planned, tensors, entries, changes, computed, group.count, on_cpu)
    if group.count == 1:
        if chosen.engine == SHARDED:
            raise RecipeError(
                "the sharded engine needs several processes, as `torchrun ... -m somf_mergekit "
                "learn recipe.yml DIR` starts them"
            )
        del needs[SHARDED]
    if changes is None:
        del needs[FACTORED]
    usable, usable_host = int(_USABLE_SHARE * free), int(_USABLE_SHARE * free_host)
    fitting = [n for n, need in needs.items() if need.least <= usable and need.host <= usable_host]
    if not chosen.engine and not fitting:
        raise RecipeError(_does_not_fit(needs, free, free_host))
    engine = chosen.engine or fitting[0]
    need = needs[engine]
    # At most half of what is free: larger micro-batches save little time.
    room = min(usable - need.held, free // 2)
    micro_batch = chosen.micro_batch_size or room // need.pair
    micro_batch = max(1, min(settings.batch_size, micro_batch))
    return Forecast(
        tensors=len(entries),
        entries=sum(entries.values()),
        pairs=len(data.pairs),
        steps=step_count(settings, len(data.pairs)),
        # One is written before the oldest goes; each may need that of the mask it keeps.
        checkpoints=GENERATIONS + 1 + (GENERATIONS if data.validation else 0),
        engine=engine,
        micro_batch=micro_batch,
        memory=need.held + micro_batch * need.pair,
        free=free,
        disk=need.disk,
        host=need.host,
        free_host=free_host,
        changes=changes if engine == FACTORED else None,
        why_dense=why_dense,
    )


def merge_bytes(planned: PlannedMerge) -> int:
    """Return about how many bytes the weights of a merge take on disk."""
    name = planned.config.out_dtype or planned.config.dtype
    if name is None:
        return weight_bytes(LoaderCache().get(planned.base_model).index.base_path)
    entries = sum(map(math.prod, tensor_shapes(planned).values()))
    return entries * dtype_from_name(name).itemsize


@dataclass(frozen=True)
class _Need:
    """What an engine needs in each process, in bytes.

    Attributes:
        held: in memory throughout.
        pair: for the activations of each pair that goes through the model at once.
        disk: in files while learning.
        host: in the host's memory, where the rest is on a GPU.
    """

    held: int
    pair: int
    disk: int = 0
    host: int = 0

    @property
    def least(self) -> int:
        """Memory with one pair at once."""
        return self.held + self.pair


def _engine_needs(
    planned: PlannedMerge,
    tensors: Mapping[str, PlannedTensor],
    entries: Mapping[str, int],
    changes: Changes | None,
    computed: int,
    processes: int,
    on_cpu: bool,
) -> dict[str, _Need]:
    """Return what each engine needs, the fastest one first.

    Args:
        planned: the recipe.
        tensors: of the merge, by name.
        entries: of the masks of those that may get one.
        changes: of adapters, where they can stay factored.
        computed: bytes of a number in the type the model computes in.
        processes: how many learn together.
        on_cpu: whether the model learns there, not on a GPU.
    """
    settings, text = planned.settings, planned.out_config.get_text_config()
    # Beside a logit, AdamW holds two numbers.
    has_moments = settings.optimizer == "adamw"
    resident = factored = outside = stores = shards = visitor = 0
    layers: Counter[str] = Counter()
    brought: Counter[str] = Counter()
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape)
        # Embeddings stay float32 under autocast.
        in_model = size * (4 if tensor.has_vocabulary else computed)
        held = size * tensor.itemsize
        # While it is read, the base is in the host's memory as it is stored.
        factored += in_model + (held if on_cpu else 0)
        for change in (changes or {}).get(name, {}).values():
            # Both matrices, what they are under the mask, and the gradient of that.
            factored += 3 * _LOGIT_BYTES * sum(matrix.numel() for matrix in change)
        linear = tensor.delta_tensors == tensor.masks
        if name in entries:
            in_model *= 2  # with the gradient
            held += size * tensor.delta_tensors * (computed if linear else tensor.itemsize)
            logits = _LOGIT_BYTES * entries[name] * (3 if has_moments else 1)
            held += logits
            factored += logits
            if has_moments and not linear:
                # The gradient and slope of each entry, until the norm of the whole is known.
                resident += 2 * _LOGIT_BYTES * entries[name]
        resident += in_model + held
        stores += held
        shards += held // processes if linear else held
        layer = _LAYER.match(name)
        if layer:
            layers[layer[1]] += in_model
            brought[layer[1]] += held
        else:
            outside += in_model
            visitor = max(visitor, held)
    pair_tokens = 2 * settings.max_length
    # Between layers the hidden states of a process' share of a step are stored, in float32.
    states = 4 * pair_tokens * settings.batch_size * text.hidden_size * text.num_hidden_layers
    by_layer = outside + max(layers.values(), default=0) + states // processes
    # Of each token, a backward pass keeps about twelve vectors of the model's width and four of the
    # feed-forward's in each layer, in float32.
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    pair_in_layer = pair_tokens * 4 * (12 * text.hidden_size + 4 * inner)
    if on_cpu:
        streaming = _Need(by_layer, pair_in_layer, disk=stores)
    else:
        # Two layers, and one tensor outside of layers, are on the GPU with what they are made of.
        on_gpu = by_layer + 2 * max(brought.values(), default=0) + visitor
        streaming = _Need(on_gpu, pair_in_layer, host=stores)
    return {
        FACTORED: _Need(factored, pair_in_layer * text.num_hidden_layers),
        RESIDENT: _Need(resident, pair_in_layer * text.num_hidden_layers),
        SHARDED: _Need(by_layer + shards, pair_in_layer),
        STREAMING: streaming,
    }


def _does_not_fit(needs: dict[str, _Need], free: int, free_host: int) -> str:
    listed = ", ".join(
        f"{name} needs about {_gib(need.least)} GiB"
        + (f" and {_gib(need.host)} GiB beside the GPU" if need.host else "")
        for name, need in needs.items()
    )
    has_host = any(need.host for need in needs.values())
    beside = f", {_gib(free_host)} GiB beside the GPU" if has_host else ""
    return (
        f"learning this mask does not fit in memory: {listed}, {_gib(free)} GiB are free{beside}. "
        "What helps: a coarser granularity, fewer masked tensors (include, exclude), a smaller "
        "max_length or batch_size, or a mask learned elsewhere (mask). --engine (SOMF_ENGINE) "
        "tries one all the same."
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"
