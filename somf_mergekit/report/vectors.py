"""Norms of task vectors and cosines between them, before and after masking.

They are taken while mergekit merges, one tensor group at a time, for its weights are in memory
then: a pass of its own would read every model again. Of each tensor a few inner products are kept;
they are taken in pieces that fit the processor's cache, and cost about what the merged sum does.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from ..pieces import row_blocks
from .names import grouped, natural


@dataclass
class TensorRecord:
    """What is known of one merged tensor.

    Attributes:
        kept_as: the name under which its mask is kept; None where it has none.
        models: the fine-tuned ones.
        before: inner products of their task vectors, (models, models), float64 on the CPU; None
            where they could not be taken, or the tensor is a buffer of infinities.
        after: the same of the masked task vectors.
    """

    kept_as: str | None
    models: tuple[str, ...]
    before: Tensor | None = None
    after: Tensor | None = None


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

    def add(self, group: TensorGroup, kept_as: str, factor: Tensor | None) -> None:
        """Record a group that is being merged. Never fails: a merge is worth more than its report.

        Args:
            group: base and fine-tuned models.
            kept_as: the name under which the group's mask is kept, where it has one.
            factor: see ``masking.mask_factor``; broadcasts to the weight; None without a mask.
        """
        models = tuple(str(entry.id) for entry in group.non_base)
        record = TensorRecord(kept_as if factor is not None else None, models)
        # Executors for several GPUs merge in several threads: each writes keys of its own.
        self.tensors[str(group.metadata.name)] = record
        try:
            before, after = inner_products(group, factor)
            if before.isfinite().all():
                record.before, record.after = before, after
        except (RuntimeError, MemoryError) as error:
            self.failure = f"{group.metadata.name}: {str(error).splitlines()[0]}"

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
            if record.before is None or record.after is None:
                continue
            places = torch.tensor([models.index(model) for model in record.models])
            for total, own in zip(sums, (record.before, record.after), strict=True):
                total[places[:, None], places] += own
        return VectorSummary(label, Gram(sums[0]), Gram(sums[1]))

    def kinds(self) -> list[VectorSummary]:
        """Return a summary for each kind of tensor, then one of all."""
        kinds = grouped(self.tensors, "kind")
        rows = [self.summary(label, names) for label, names in kinds.items()]
        return [*rows, self.summary("all", list(self.tensors))]


def inner_products(group: TensorGroup, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the inner products of task vectors before and after masking, float64 on the CPU.

    Products of a piece are summed in float32, the pieces' sums in float64.

    Args:
        group: base and fine-tuned models.
        factor: see ``masking.mask_factor``; broadcasts to the weight; None without a mask.
    """
    base, models = group.base.tensor, group.non_base
    before = torch.zeros(len(models), len(models), dtype=torch.float64, device=base.device)
    after = before if factor is None else torch.zeros_like(before)
    spread = None if factor is None else factor.expand(base.shape)
    for rows in row_blocks(base):
        start = base[rows].float()
        vectors = torch.empty(len(models), *start.shape, device=base.device)
        for vector, entry in zip(vectors, models, strict=True):
            torch.sub(entry.tensor[rows], start, out=vector)
        flat = vectors.view(len(models), -1)
        before += flat @ flat.T
        if spread is not None:
            vectors *= spread[rows]
            after += flat @ flat.T
    return before.cpu(), after.cpu()


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
