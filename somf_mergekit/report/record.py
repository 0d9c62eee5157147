"""What is kept of a merge while it runs, for its report."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ..masks import MaskSet
from ..phases import LEARNING, timed
from ..plan import PlannedMerge
from .vectors import TaskVectors, recording


@dataclass
class MergeRecord:
    """One merge into a folder.

    Attributes:
        seconds: of each phase.
        vectors: of the tensors merged under the mask.
        planned: the merge; None until it is planned.
        masks: that it uses; None likewise.
        folder: of the mask; the report goes there.
        with_vectors: whether task vectors are recorded.
    """

    seconds: dict[str, float]
    vectors: TaskVectors = field(default_factory=TaskVectors)
    planned: PlannedMerge | None = None
    masks: MaskSet | None = None
    folder: str = ""
    with_vectors: bool = True
    _open: ExitStack = field(default_factory=ExitStack)

    def begin(self, planned: PlannedMerge, masks: MaskSet, folder: str) -> None:
        """Take what is merged under which mask, before the first tensor is merged."""
        self.planned, self.masks, self.folder = planned, masks, folder
        if self.with_vectors:
            self._open.enter_context(recording(masks.path, self.vectors))

    def end(self) -> None:
        """Record no tensor any more: all are merged."""
        self._open.close()

    @property
    def origin(self) -> str:
        """Where the mask is from: ``given``, ``learned`` in this merge, or ``reused``."""
        if self.planned is not None and self.planned.settings.mask:
            return "given"
        return "learned" if LEARNING in self.seconds else "reused"


_CURRENT: ContextVar[MergeRecord | None] = ContextVar("_CURRENT", default=None)
_UNMASKED: ContextVar[str | None] = ContextVar("_UNMASKED", default=None)


@contextmanager
def recorded_merge(*, with_vectors: bool) -> Iterator[MergeRecord]:
    """Record the merge that is made inside, its task vectors too where asked for."""
    with timed() as seconds, ExitStack() as opened:
        record = MergeRecord(seconds, with_vectors=with_vectors, _open=opened)
        token = _CURRENT.set(record)
        try:
            yield record
        finally:
            _CURRENT.reset(token)


def current_record() -> MergeRecord | None:
    """Return the record of the merge that is being made, None where it is not recorded."""
    return _CURRENT.get()


@contextmanager
def unmasked_merge(masks: MaskSet) -> Iterator[None]:
    """Merge without a mask inside: what the same recipe gives where no tensor has one of ``masks``.

    The fusion is then the same in everything, what it draws at random included.
    """
    token = _UNMASKED.set(masks.path)
    try:
        yield
    finally:
        _UNMASKED.reset(token)


def unmasked() -> str | None:
    """Return the mask file whose masks are left out, None where a merge has its mask."""
    return _UNMASKED.get()
