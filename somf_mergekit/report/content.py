"""What a report holds, and its form for programs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.requirements import versions
from ..data.held_out import KEY, recorded_held_out, why_none
from ..evaluate.evaluation import Evaluation
from ..evaluate.evaluation_table import as_json
from ..mask.census import MaskCensus
from ..prepass.plan import PlannedMerge
from ..prepass.provenance import recorded_settings
from .curve import curve_rows
from .vectors import Gram, TaskVectors, VectorSummary

FORMAT = "somf-report/1"


@dataclass
class Report:
    """What a report holds; what could not be made stays empty.

    Attributes:
        planned: the merge.
        origin: of its mask: ``learned`` now, ``reused``, or ``given``.
        told: what is told with the learned mask.
        vectors: of the tensors that were merged.
        seconds: of each phase.
        evaluation: of the merge beside the plain fusion and the base.
        history: a row per step of learning.
        census: of the masks of the tensors that were merged; None where none had one.
        has_figure: whether there are plots.
        peak_memory: see ``memory.peak_memory``.
        failures: what could not be made and why.
    """

    planned: PlannedMerge
    origin: str
    told: dict[str, Any]
    vectors: TaskVectors
    seconds: dict[str, float]
    evaluation: Evaluation | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    census: MaskCensus | None = None
    has_figure: bool = False
    peak_memory: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def unmasked(self) -> int:
        """How many merged tensors have no mask."""
        return len(self.vectors.tensors) - len(self.vectors.masked())


def report_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON: numbers, names and settings, no text of any data."""
    settings, told, vectors = report.planned.settings, report.told, report.vectors
    models = vectors.models
    evaluation = report.evaluation
    return {
        "format": FORMAT,
        "merge": {
            "base_model": str(report.planned.base_model),
            "models": models,
            "fusion": settings.fusion,
            "settings": recorded_settings(report.planned),
        },
        "mask": {
            "origin": report.origin,
            "given": settings.mask,
            "tensors": len(vectors.masked()),
            "tensors_without": report.unmasked,
            **(_mask_json(report.census) if report.census else {}),
        },
        "task_vectors": {
            "groups": [_vectors_json(group, models) for group in vectors.kinds()],
            "missing": vectors.failure,
        },
        "learning": {
            **{key: told.get(key) for key in _OF_LEARNING},
            KEY: _held_out_json(told),
            "curve": [asdict(row) for row in curve_rows(report.history)],
        },
        "evaluation": as_json(evaluation) if evaluation else None,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory,
        "versions": versions(),
        "failures": report.failures,
    }


_OF_LEARNING = (
    "base_model",
    "models",
    "dataset",
    "utility_dataset",
    "settings",
    "steps",
    "tensors",
    "entries",
    "learned_with",
    "versions",
)


def short_names(models: Sequence[str]) -> list[str]:
    """Return what tables call models: the last part of their paths, where those differ."""
    short = [os.path.basename(model.rstrip("/")) for model in models]
    return short if len(set(short)) == len(short) else list(models)


def _held_out_json(told: Mapping[str, Any]) -> dict[str, Any]:
    found = recorded_held_out(told)
    return {"pairs": 0, "why_none": why_none(told)} if found is None else found.record


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
        pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
        return {
            "norms": dict(zip(models, gram.norms, strict=True)),
            "cosines": [
                {"models": [models[i], models[j]], "cosine": gram.cosine(i, j)} for i, j in pairs
            ],
        }

    return {"label": group.label, "before": of_gram(group.before), "after": of_gram(group.after)}
