"""The training curve of a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


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
