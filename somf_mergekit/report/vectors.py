"""Norms of task vectors and cosines between them, before and after masking.

They are taken while mergekit merges, one tensor group at a time, for its weights are in memory
then: a pass of its own would read every model again. Sums are shown the very pieces that they add
up, which are in the processor's cache. Of each tensor a few inner products are kept.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from ..common.errors import first_line
from ..fusion.sums import Watch
from ..mask.census import grouped, natural


@dataclass
class TensorRecord:
    """What is known of one merged tensor.

    Attributes:
        kept_as: the name under which its mask is kept; None where it has none.
        models: the fine-tuned ones.
        before: inner products of their task vectors, (models, models), float64; None before any
            are known.
        after: the same of the masked task vectors.
        broken: whether some are missing.
    """

    kept_as: str | None
    models: tuple[str, ...]
    before: Tensor | None = None
    after: Tensor | None = None
    broken: bool = False

    def add(self, vectors: Tensor, factor: Tensor) -> None:
        """Add a piece: its products are summed in float32, the pieces' sums in float64.

        Args:
            vectors: task vectors, (models, rows, ...); written over.
            factor: of these rows, see ``masking.mask_factor``.
        """
        flat = vectors.view(len(vectors), -1)
        before = (flat @ flat.T).double()
        self.before = before if self.before is None else self.before + before
        if self.kept_as is None:
            self.after = self.before
            return
        vectors.mul_(factor)
        after = (flat @ flat.T).double()
        self.after = after if self.after is None else self.after + after

    def products(self) -> tuple[Tensor, Tensor] | None:
        """Return ``before`` and ``after`` on the CPU.

        None where they could not be taken, or the tensor is a buffer of infinities.
        """
        if self.before is None or self.after is None or self.broken:
            return None
        return (self.before.cpu(), self.after.cpu()) if self.before.isfinite().all() else None


class Gram:
    """Inner products of vectors.

    Args:
        products: (vectors, vectors), float64.
    """

    def __init__(self, products: Tensor):
        self._products = products.tolist()

    @property
    def norms(self) -> list[float]:
        """The Euclidean norm of each vector."""
        return [math.sqrt(max(0.0, row[index])) for index, row in enumerate(self._products)]

    def cosine(self, one: int, other: int) -> float | None:
        """Return the cosine between two vectors, None where one is zero."""
        norms = self.norms
        if not norms[one] or not norms[other]:
            return None
        return float(self._products[one][other] / (norms[one] * norms[other]))


@dataclass(frozen=True)
class VectorSummary:
    """Task vectors of a group of tensors, each laid out as one vector.

    Attributes:
        label: of the group.
        before: of the task vectors.
        after: of the masked task vectors.
    """

    label: str
    before: Gram
    after: Gram


@dataclass
class TaskVectors:
    """What is kept of the tensors of one merge.

    Attributes:
        tensors: by name in the merged checkpoint.
        failure: why inner products are missing, if they are.
    """

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    failure: str | None = None

    def watch(self, group: TensorGroup, kept_as: str | None) -> Watch:
        """Record a group that is being merged, and return what is to be shown its task vectors.

        That never fails: a merge is worth more than its report.

        Args:
            group: base and fine-tuned models.
            kept_as: the name under which the group's mask is kept; None without one.
        """
        record = TensorRecord(kept_as, tuple(str(entry.id) for entry in group.non_base))
        # Executors for several GPUs merge in several threads: each writes keys of its own.
        name = str(group.metadata.name)
        self.tensors[name] = record

        def shown(vectors: Tensor, factor: Tensor) -> None:
            try:
                record.add(vectors, factor)
            except (RuntimeError, MemoryError) as error:
                record.broken = True
                self.failure = f"{name}: {first_line(error)}"

        return shown

    @property
    def models(self) -> list[str]:
        """All fine-tuned models, in the order in which they come."""
        return list(dict.fromkeys(m for record in self.tensors.values() for m in record.models))

    def masked(self) -> dict[str, str]:
        """Return the tensors that were merged under a mask, and the names of their masks."""
        ordered = sorted(self.tensors, key=natural)
        found = {name: self.tensors[name].kept_as for name in ordered}
        return {name: kept_as for name, kept_as in found.items() if kept_as is not None}

    def summary(self, label: str, names: Sequence[str]) -> VectorSummary:
        """Return the inner products of the task vectors of the tensors ``names`` together."""
        models = self.models
        sums = torch.zeros(2, len(models), len(models), dtype=torch.float64)
        for name in names:
            record = self.tensors[name]
            products = record.products()
            if products is None:
                continue
            places = torch.tensor([models.index(model) for model in record.models])
            for total, own in zip(sums, products, strict=True):
                total[places[:, None], places] += own
        return VectorSummary(label, Gram(sums[0]), Gram(sums[1]))

    def kinds(self) -> list[VectorSummary]:
        """Return a summary for each kind of tensor, then one of all."""
        kinds = grouped(self.tensors, "kind")
        rows = [self.summary(label, names) for label, names in kinds.items()]
        return [*rows, self.summary("all", list(self.tensors))]


_RECORDING: dict[str, TaskVectors] = {}


@contextmanager
def recording(masks: str, vectors: TaskVectors) -> Iterator[None]:
    """Record what is merged under the mask file ``masks`` into ``vectors``."""
    _RECORDING[masks] = vectors
    try:
        yield
    finally:
        del _RECORDING[masks]


def recorded(masks: str) -> TaskVectors | None:
    """Return where merges under the mask file ``masks`` are recorded, None where they are not."""
    # By file and not by context: executors for several GPUs merge in threads of their own.
    return _RECORDING.get(masks)
