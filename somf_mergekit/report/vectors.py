"""Norms of task vectors and cosines between them, before and after masking.

They are taken while mergekit merges, one tensor group at a time, for its weights are in memory
then: a pass of its own would read every model again. Sums show the very pieces that they add up,
which are in the processor's cache. A few inner products of each tensor are recorded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from ..common.errors import first_line
from ..fusion.masked_fusion import Watch
from ..mask.census import grouped, natural


@dataclass
class TensorRecord:
    """What is known of one merged tensor.

    Attributes:
        masked: the names under which its masks are stored, by model; of those that have one.
        models: the fine-tuned ones.
        products: inner products of their task vectors and of the masked ones, (2, models, models),
            float64; None before any are known, NaN where they could not be taken.
    """

    masked: Mapping[str, str]
    models: tuple[str, ...]
    products: Tensor | None = None

    def add(self, vectors: Tensor, factor: Tensor) -> None:
        """Add a piece: its products are summed in float32, the pieces' sums in float64.

        Args:
            vectors: task vectors, (models, rows, ...); written over.
            factor: of these rows, see ``masking.mask_factor``; broadcasts to the vectors.
        """
        flat = vectors.view(len(vectors), -1)
        before = after = flat @ flat.T
        if self.masked:
            vectors.mul_(factor)
            after = flat @ flat.T
        products = torch.stack([before, after]).double()
        self.products = products if self.products is None else self.products + products


class Gram:
    """Inner products of vectors.

    Args:
        products: (vectors, vectors), float64.
    """

    def __init__(self, products: Tensor):
        self._products = products.tolist()
        self.norms = [math.sqrt(max(0.0, row[at])) for at, row in enumerate(self._products)]

    def cosine(self, one: int, other: int) -> float | None:
        """Return the cosine between two vectors, None where one is zero."""
        if not self.norms[one] or not self.norms[other]:
            return None
        return float(self._products[one][other] / (self.norms[one] * self.norms[other]))


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


# One object is handed to mergekit's tasks of all tensors, which are hashed by value.
@dataclass(eq=False)
class TaskVectors:
    """Observes the tensors of one merge.

    Attributes:
        tensors: by name in the merged checkpoint.
        failure: why inner products are missing, if they are.
    """

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    failure: str | None = None

    def watch(self, group: TensorGroup, masked: Mapping[str, str]) -> Watch:
        """Record a group that is being merged, and return what is to be shown its task vectors.

        That never fails: a merge is worth more than its report.

        Args:
            group: base and fine-tuned models.
            masked: the names under which its masks are stored, by model.
        """
        record = TensorRecord(masked, tuple(str(entry.id) for entry in group.non_base))
        # Executors for several GPUs merge in several threads: each writes keys of its own.
        name = str(group.metadata.name)
        self.tensors[name] = record

        def shown(vectors: Tensor, factor: Tensor) -> None:
            try:
                record.add(vectors, factor)
            except (RuntimeError, MemoryError) as error:
                record.products = torch.tensor(math.nan)
                self.failure = f"{name}: {first_line(error)}"

        return shown

    @property
    def models(self) -> list[str]:
        """All fine-tuned models, in the order in which they come."""
        return list(dict.fromkeys(m for record in self.tensors.values() for m in record.models))

    def masked(self, model: str | None = None) -> dict[str, str]:
        """Return the tensors that were merged under a mask, and the names of their masks.

        Args:
            model: whose mask it was; None for any.
        """
        found = {}
        for name in sorted(self.tensors, key=natural):
            masked = self.tensors[name].masked
            own = masked.get(model) if model else next(iter(masked.values()), None)
            if own is not None:
                found[name] = own
        return found

    def summary(self, label: str, names: Sequence[str]) -> VectorSummary:
        """Return the inner products of the task vectors of the tensors ``names`` together.

        Tensors whose products could not be taken are left out, and buffers of infinities.
        """
        models = self.models
        sums = torch.zeros(2, len(models), len(models), dtype=torch.float64)
        for record in (self.tensors[name] for name in names):
            if record.products is not None and record.products.isfinite().all():
                places = torch.tensor([models.index(model) for model in record.models])
                sums[:, places[:, None], places] += record.products.cpu()
        return VectorSummary(label, Gram(sums[0]), Gram(sums[1]))

    def kinds(self) -> list[VectorSummary]:
        """Return a summary for each kind of tensor, then one of all."""
        kinds = grouped(self.tensors, "kind")
        rows = [self.summary(label, names) for label, names in kinds.items()]
        return [*rows, self.summary("all", list(self.tensors))]
