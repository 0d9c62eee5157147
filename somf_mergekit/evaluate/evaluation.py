"""What an evaluation found: measures with their intervals, and differences to the first model."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .evaluation_settings import EvaluationSettings

SHARE, NUMBER = "share", "number"
# The measure that the phrase list gives.
BY_PHRASES = "refusals (phrases)"
_COVERED = 0.95
# Value and standard error by metric, by task of lm-evaluation-harness.
HarnessResults = dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class Ratio:
    """One measure of one model: sum(totals) / sum(weights), an entry per example.

    An example that says nothing of the measure has weight 0.
    """

    totals: list[float]
    weights: list[float]


@dataclass
class Measure:
    """What one row of the table is computed from.

    Attributes:
        set: what it is measured on.
        name: of the measure.
        unit: ``share`` (0 to 1) or ``number``.
        exponential: whether the measure is exp of its ratio (a perplexity).
        groups: which examples belong together in the bootstrap.
        models: by model name; a model is missing where the measure can't be taken.
    """

    set: str
    name: str
    unit: str
    exponential: bool = False
    groups: Sequence[Hashable] = ()
    models: dict[str, Ratio] = field(default_factory=dict)


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
        harness: what lm-evaluation-harness found, by model.
        sets: where each set is from, in words, and how many examples of it were used.
        notes: what could not be measured, and why.
        settings: of the evaluation.
        failures: what failed on the way, a sentence each; all else was measured.
    """

    models: Mapping[str, tuple[str, str]]
    base: str
    rows: Sequence[Row]
    harness: Mapping[str, HarnessResults]
    sets: Mapping[str, tuple[str, int]]
    notes: Sequence[str]
    settings: EvaluationSettings
    failures: Sequence[str] = ()

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
    """Return a measure's row, its intervals by a percentile bootstrap.

    Every model is resampled by the same examples, so that differences are paired.

    Args:
        measure: of some of the models.
        models: their names; differences are to the first, where the measure has that.
        resamples: how many.
        seed: of the draws.
    """
    names = [name for name in models if name in measure.models]
    # Float64 (examples, models, 2): numerators and denominators.
    table = np.array([[measure.models[n].totals, measure.models[n].weights] for n in names])
    table = table.transpose(2, 0, 1)
    sums = table.sum(axis=0), _resampled_sums(table, measure, resamples, seed)
    ratios = (_ratios(of, measure.exponential) for of in sums)
    point, resampled = (dict(zip(names, of.T, strict=True)) for of in ratios)
    has_value = dict(zip(names, table[:, :, 1].sum(axis=0) > 0, strict=True))
    first = models[0]
    estimates, differences = {}, {}
    for name in names:
        estimates[name] = _estimate(has_value[name], point[name], resampled[name])
        if first in names and name != first:
            differences[name] = _estimate(
                has_value[name] and has_value[first],
                point[name] - point[first],
                resampled[name] - resampled[first],
            )
    return Row(measure, estimates, differences)


def _resampled_sums(table: np.ndarray, measure: Measure, resamples: int, seed: int) -> np.ndarray:
    """Return the sums over resampled examples, float64 (resamples, models, 2).

    Examples of one group (pairs of one prompt) are drawn together: they aren't independent. The
    groups are numbered as they first appear.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(measure.groups))}
    sums = np.zeros((len(numbers), *table.shape[1:]))
    np.add.at(sums, [numbers[group] for group in measure.groups], table)
    draws = np.random.default_rng(seed)
    picks = (draws.integers(len(sums), size=len(sums)) for _ in range(resamples))
    return np.stack([sums[pick].sum(axis=0) for pick in picks])


def _ratios(sums: np.ndarray, exponential: bool) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
        return np.exp(ratios) if exponential else ratios


def _estimate(has_value: bool, value: float, resampled: np.ndarray) -> Estimate:
    """Return a value with the central 95 % of its resamples, NaN where one had nothing to measure.

    Args:
        has_value: whether any example says something of it.
        value: of all examples.
        resampled: float64 (resamples,).
    """
    if not has_value:
        return Estimate(None, None)
    known = resampled[~np.isnan(resampled)]
    if not len(known) or not math.isfinite(value):
        return Estimate(float(value), None)
    tail = (1 - _COVERED) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(float(value), (float(low), float(high)))
