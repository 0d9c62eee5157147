"""What a report holds, and its form for programs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, pairwise
from typing import Any

from ..common.requirements import versions
from ..data.held_out import KEY, recorded_held_out, why_none
from ..evaluate.evaluation import Evaluation
from ..evaluate.evaluation_table import as_json
from ..mask.census import MaskCensus
from ..prepass.plan import PlannedMerge
from ..prepass.provenance import VALIDATION, recorded_settings
from .vectors import Gram, TaskVectors, VectorSummary

FORMAT = "somf-report/1"
# Of what is recorded with a mask: what it was learned from, and how.
_OF_LEARNING = (
    "base_model",
    "models",
    "dataset",
    "utility_dataset",
    "settings",
    "steps",
    VALIDATION,
    "tensors",
    "entries",
    "learned_with",
    "versions",
)


@dataclass
class Report:
    """What a report holds; what could not be made stays empty.

    Attributes:
        planned: the merge.
        origin: of its mask: ``learned`` now, ``reused``, or ``given``.
        recorded: the provenance of the learned mask.
        vectors: of the tensors that were merged.
        seconds: of each phase.
        evaluation: of the merge beside the plain fusion and the base.
        history: a row per step of learning.
        censuses: of the masks of the tensors that were merged, by model, or under None where one
            mask is of all; none where no tensor had one.
        has_figure: whether there are plots.
        peak_memory: bytes, ``process`` and, on a GPU, ``device``.
        failures: what could not be made and why.
        pinned: the commit of a published mask that was taken, ORGANISATION/NAME@COMMIT.
    """

    planned: PlannedMerge
    origin: str
    recorded: dict[str, Any]
    vectors: TaskVectors
    seconds: dict[str, float]
    evaluation: Evaluation | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    censuses: dict[str | None, MaskCensus] = field(default_factory=dict)
    has_figure: bool = False
    peak_memory: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    pinned: str | None = None

    @property
    def census(self) -> MaskCensus | None:
        """Of all masks together; None where no tensor had one."""
        return MaskCensus.combined([*self.censuses.values()]) if self.censuses else None

    @property
    def unmasked(self) -> int:
        """How many merged tensors have no mask."""
        return len(self.vectors.tensors) - len(self.vectors.masked())


@dataclass(frozen=True)
class CurveRow:
    """The means over consecutive optimiser steps.

    Attributes:
        first, last: the steps, counted from 1.
        loss: the objective's.
        accuracy: share of pairs with a positive margin; None where the objective has no margin.
        margin: mean reward margin; None likewise.
        utility: mean divergence from the plain merge; None without a utility term.
        seconds: of all these steps together.
    """

    first: int
    last: int
    loss: float
    accuracy: float | None
    margin: float | None
    utility: float | None
    seconds: float


def curve_rows(history: Sequence[dict[str, Any]], count: int = 8) -> list[CurveRow]:
    """Return the training curve in ``count`` rows, fewer where there are fewer steps.

    A step shows its own few pairs: only the means of several are worth reading.
    """
    count = min(count, len(history))
    edges = [round(number * len(history) / count) for number in range(count + 1)] if count else []
    return [_mean_row(history[start:end]) for start, end in pairwise(edges)]


def _mean_row(rows: Sequence[dict[str, Any]]) -> CurveRow:
    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    return CurveRow(
        first=rows[0]["step"],
        last=rows[-1]["step"],
        loss=mean("loss") or 0.0,
        accuracy=mean("accuracy"),
        margin=mean("margin"),
        utility=mean("utility"),
        seconds=sum(row["seconds"] for row in rows),
    )


def short_names(models: Sequence[str]) -> list[str]:
    """Return what tables call models: the last part of their paths, where those differ."""
    short = [os.path.basename(model.rstrip("/")) for model in models]
    return short if len(set(short)) == len(short) else list(models)


def report_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON: numbers, names and settings, no text of any data."""
    settings, recorded, vectors = report.planned.settings, report.recorded, report.vectors
    return {
        "format": FORMAT,
        "merge": {
            "base_model": str(report.planned.base_model),
            "models": vectors.models,
            "fusion": settings.fusion,
            "settings": recorded_settings(report.planned),
        },
        "mask": {
            "origin": report.origin,
            "given": {str(model): source for model, source in report.planned.given.items()},
            "pinned": report.pinned,
            "tensors": len(vectors.masked()),
            "tensors_without": report.unmasked,
            **(_mask_json(report.census) if report.census else {}),
            "models": {m: _mask_json(own) for m, own in report.censuses.items() if m},
        },
        "task_vectors": {
            "groups": [_vectors_json(group, vectors.models) for group in vectors.kinds()],
            "missing": vectors.failure,
        },
        "learning": {
            **{key: recorded.get(key) for key in _OF_LEARNING},
            KEY: _held_out_json(recorded),
            "curve": [asdict(row) for row in curve_rows(report.history)],
        },
        "evaluation": as_json(report.evaluation) if report.evaluation else None,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory,
        "versions": versions(),
        "failures": report.failures,
    }


def _held_out_json(recorded: Mapping[str, Any]) -> dict[str, Any]:
    found = recorded_held_out(recorded)
    return {"pairs": 0, "why_none": why_none(recorded)} if found is None else found.record


def _mask_json(census: MaskCensus) -> dict[str, Any]:
    collapses = census.collapses()

    def of_tensor(name: str) -> dict[str, Any]:
        ways = [collapse.what for collapse in collapses if name in collapse.tensors]
        return {**asdict(census.summary(name, [name])), "collapsed": ways}

    return {
        "total": asdict(census.total()),
        "layers": [asdict(row) for row in census.groups("layer")],
        "kinds": [asdict(row) for row in census.groups("kind")],
        "by_tensor": [of_tensor(name) for name in census.counts],
        "collapsed": [asdict(collapse) for collapse in collapses],
    }


def _vectors_json(group: VectorSummary, models: Sequence[str]) -> dict[str, Any]:
    def of_gram(gram: Gram) -> dict[str, Any]:
        pairs = combinations(range(len(models)), 2)
        return {
            "norms": dict(zip(models, gram.norms, strict=True)),
            "cosines": [
                {"models": [models[i], models[j]], "cosine": gram.cosine(i, j)} for i, j in pairs
            ],
        }

    return {"label": group.label, "before": of_gram(group.before), "after": of_gram(group.after)}
