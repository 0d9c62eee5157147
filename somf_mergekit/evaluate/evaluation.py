"""What an evaluation found: measures with their intervals, and differences to the first model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import interval, resampled_sums
from .measures import Measure
from .measuring import EvaluationSettings

HarnessResults = dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; both are None where there was nothing to measure."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A measure with what it is for each model that it could be taken of.

    Attributes:
        measure: with the values of every example.
        estimates: by model name.
        differences: to the first model, by the other models' names, paired by example.
    """

    measure: Measure
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    def examples(self, model: str) -> int:
        """Return how many examples say something of the measure."""
        return sum(weight > 0 for weight in self.measure.models[model].weights)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        models: their names, with where each is from and a digest of its content.
        base: the name of the model that perplexity and distance are measured with.
        rows: the measures, in the table's order.
        harness: metric values with standard errors of lm-evaluation-harness, by model and task.
        sets: where each set is from, in words, and how many examples of it were used.
        notes: what could not be measured, and why.
        settings: of the evaluation.
    """

    models: Mapping[str, tuple[str, str]]
    base: str
    rows: Sequence[Row]
    harness: Mapping[str, HarnessResults]
    sets: Mapping[str, tuple[str, int]]
    notes: Sequence[str]
    settings: EvaluationSettings

    def row(self, set_name: str, measure: str) -> Row:
        """Return one row.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.rows:
            if (row.measure.set, row.measure.name) == (set_name, measure):
                return row
        raise KeyError((set_name, measure))


def row_of(measure: Measure, models: Sequence[str], resamples: int, seed: int) -> Row:
    """Return a measure's row; differences are to the first of ``models``, where that has one."""
    names = [name for name in models if name in measure.models]
    columns = [
        column
        for name in names
        for column in (measure.models[name].totals, measure.models[name].weights)
    ]
    table = np.array(columns).T
    # Numerator and denominator of each model, (models, 2), and of all resamples, (..., models, 2).
    whole = table.sum(axis=0).reshape(-1, 2)
    sums = resampled_sums(table, measure.groups, resamples, seed).reshape(resamples, -1, 2)
    points, spread = (_ratios(s, measure.exponential) for s in (whole, sums))
    values: dict[str, float | None] = {
        name: float(point) if weight else None
        for name, point, weight in zip(names, points, whole[:, 1], strict=True)
    }
    resampled = dict(zip(names, spread.T, strict=True))
    estimates = {name: _estimate(values[name], resampled[name]) for name in names}
    first = models[0]
    differences = {
        name: _estimate(_less(values[name], values[first]), resampled[name] - resampled[first])
        for name in names
        if first in names and name != first
    }
    return Row(measure, estimates, differences)


def _ratios(sums: np.ndarray, exponential: bool) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
        return np.exp(ratios) if exponential else ratios


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _estimate(value: float | None, resampled: np.ndarray) -> Estimate:
    if value is None:
        return Estimate(None, None)
    return Estimate(float(value), interval(resampled) if math.isfinite(value) else None)
