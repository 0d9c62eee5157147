"""What learning a mask takes on this machine, and so which engine runs it: read off headers."""

import math
from dataclasses import dataclass, replace

from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache

from ..common import machine
from ..common.errors import RecipeError
from ..common.machine import FACTORED, SHARDED
from ..common.process_group import ALONE, Processes, own_device
from ..learner.checkpoints import GENERATIONS
from ..learner.few_bits import FewBits, precision_text
from ..learner.loop import step_count
from ..mask.granularity import weight_storage
from .engine_needs import LOGIT_BYTES, Need, engine_needs
from .factored_tensors import Changes, changes_or_why, few_bits_of
from .headers import planned_tensors, tensor_shapes
from .learning_data import SafetyData
from .places import File, weight_bytes
from .plan import PlannedMerge

# What a forecast leaves to the rest of the system, and to what it does not know.
_USABLE_SHARE = 0.9
_GIB = 1 << 30


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
        few_bits: the weights of the base that are in few bits; None for none.
        recomputes: whether a backward pass computes each layer again, for want of memory.
        exact: of the comparison of held-out pairs, where the base is in few bits; else None.
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
    few_bits: FewBits | None = None
    recomputes: bool = False
    exact: "Forecast | None" = None
    why_dense: str = ""

    @property
    def line(self) -> str:
        """The engine and its need."""
        line = f"{self.engine}: needs about {_gib(self.memory)} of {_gib(self.free)} GiB free"
        if self.host:
            line += f", and {_gib(self.host)} of {_gib(self.free_host)} GiB beside the GPU"
        line += f", and {_gib(self.disk)} GiB of disk" if self.disk else ""
        if self.few_bits:
            line += f"; the base's linear layers are in {precision_text(self.few_bits.precision)}"
        if self.recomputes:
            line += "; to save memory, backward passes compute each layer again"
        return line + (f"; adapters are multiplied out: {self.why_dense}" if self.why_dense else "")

    def files(self, folder: str) -> list[File]:
        """Return what learning writes into the mask's folder or beside it, see ``check_room``."""
        return [
            ("the mask", folder, self.entries),
            ("checkpoints", folder, LOGIT_BYTES * self.entries * self.checkpoints),
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
    return _forecast(planned, data, group, *changes_or_why(planned))


def _forecast(
    planned: PlannedMerge,
    data: SafetyData,
    group: Processes,
    changes: Changes | None,
    why_dense: str,
) -> Forecast:
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
    few_bits, in_few_bits = None, {}
    if chosen.base_precision and changes is not None:
        few_bits, names = few_bits_of(planned, chosen.base_precision)
        in_few_bits = dict.fromkeys(names, few_bits.bytes_each)
    needs = engine_needs(
        planned, tensors, entries, changes, in_few_bits, computed, group.count, on_cpu
    )
    if group.count == 1:
        if chosen.engine == SHARDED:
            raise RecipeError(
                "the sharded engine needs several processes, as `torchrun ... -m somf_mergekit "
                "learn recipe.yml DIR` starts them"
            )
        del needs[SHARDED]
    if changes is None:
        del needs[FACTORED]
    elif few_bits:
        needs = {FACTORED: needs[FACTORED]}
    usable, usable_host = int(_USABLE_SHARE * free), int(_USABLE_SHARE * free_host)
    fitting = [n for n, need in needs.items() if need.least <= usable and need.host <= usable_host]
    if not chosen.engine and not fitting:
        raise RecipeError(_does_not_fit(needs, free, free_host))
    engine = chosen.engine or fitting[0]
    need, exact = needs[engine], None
    if few_bits and data.held_out:
        exact = _of_exact_base(planned, data, group, changes)
    # At most half of what is free: larger micro-batches save little time.
    room = min(usable - need.held, free // 2)
    pair, recomputes = need.pair, False
    if need.pair_recomputed is not None and need.held + pair > usable:
        pair, recomputes = need.pair_recomputed, True
    micro_batch = chosen.micro_batch_size or room // pair
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
        memory=need.held + micro_batch * pair,
        free=free,
        disk=need.disk,
        host=need.host,
        free_host=free_host,
        changes=changes if engine == FACTORED else None,
        few_bits=few_bits,
        recomputes=recomputes,
        exact=exact,
        why_dense=why_dense,
    )


def merge_bytes(planned: PlannedMerge) -> int:
    """Return about how many bytes the weights of a merge take on disk."""
    name = planned.config.out_dtype or planned.config.dtype
    if name is None:
        return weight_bytes(LoaderCache().get(planned.base_model).index.base_path)
    entries = sum(map(math.prod, tensor_shapes(planned).values()))
    return entries * dtype_from_name(name).itemsize


def _of_exact_base(
    planned: PlannedMerge, data: SafetyData, group: Processes, changes: Changes | None
) -> Forecast:
    """Return what comparing held-out pairs takes, on any engine, under the merge that is written.

    Raises:
        RecipeError: no engine fits in what is free.
    """
    own = replace(planned.options.machine, base_precision=None, engine=None)
    options = planned.options.model_copy(update={"machine": own})
    try:
        return _forecast(replace(planned, options=options), data, group, changes, "")
    except RecipeError as error:
        raise RecipeError(
            "held-out pairs are compared with the base as it is, whatever --base-precision says: "
            f"{error.message} `held_out_share: 0` leaves the comparison out."
        ) from error


def _does_not_fit(needs: dict[str, Need], free: int, free_host: int) -> str:
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
