"""Percentile bootstrap of ratios of sums, paired where models answered the same prompts."""

from collections.abc import Hashable, Sequence

import numpy as np

COVERED = 0.95


def resampled_sums(
    columns: np.ndarray, groups: Sequence[Hashable], resamples: int, seed: int
) -> np.ndarray:
    """Return the sums of each column over resampled examples.

    Every column is summed over the same examples, so that what is computed of the columns of two
    models can be compared resample by resample. Examples of one group (pairs of one prompt) are
    drawn together, for they are not independent.

    Args:
        columns: float64 (examples, columns).
        groups: of each example.
        resamples: how many.
        seed: of the draws; the groups are numbered as they first appear.

    Returns:
        float64 (resamples, columns).
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    rows = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(rows, [numbers[group] for group in groups], columns)
    draws = np.random.default_rng(seed)
    return np.stack(
        [rows[draws.integers(len(rows), size=len(rows))].sum(axis=0) for _ in range(resamples)]
    )


def interval(statistics: np.ndarray) -> tuple[float, float] | None:
    """Return the central 95 % of a resampled statistic; None where no resample has one.

    Args:
        statistics: float64 (resamples,), NaN where a resample had nothing to measure.
    """
    known = statistics[~np.isnan(statistics)]
    if not len(known):
        return None
    tail = (1 - COVERED) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
