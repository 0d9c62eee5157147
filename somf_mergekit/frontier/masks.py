"""The masks of a frontier: which there are, which are known, and how long the others take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from ..digests import json_digest
from ..errors import RecipeError
from ..inputs import SafetyData, checked_data, given_mask
from ..learner.loop import step_count
from ..mask_folder import MASKS_FILE
from ..masks import MaskSet
from ..plan import PlannedMerge
from ..planner import planned_merge
from ..prepass import learning_date, mask_for
from ..provenance import differences, learning_fingerprint, resolved_learning
from ..report.curve import training_history
from .over import MASK
from .points import RECIPE_LABEL, Point, file_name, values_text, with_mask, with_values

OWN_FOLDER, FURTHER_FOLDER = "mask", "masks"


@dataclass(frozen=True)
class WantedMask:
    """A mask that points share.

    Attributes:
        label: what it is learned with, or where it is given.
        place: its folder.
        planned: what learns it; None for one that is given.
        data: that it is learned on; None likewise.
    """

    label: str
    place: str
    planned: PlannedMerge | None = None
    data: SafetyData | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps that learn it."""
        if self.planned is None or self.data is None:
            return 0
        return step_count(self.planned.settings, len(self.data.pairs))

    @property
    def pairs(self) -> int:
        """Pairs that go through the model in all steps together."""
        return 0 if self.planned is None else self.steps * self.planned.settings.batch_size

    def is_there(self) -> bool:
        """Whether nothing is left to learn."""
        if self.planned is None or self.data is None:
            return True
        if not (Path(self.place) / MASKS_FILE).exists():
            return False
        told = MaskSet.open(self.place).provenance
        models = [str(model) for model in self.planned.models]
        return not differences(told, learning_fingerprint(self.planned, self.data), models)

    def masks(self) -> MaskSet:
        """Return the mask, learned now where it has to be.

        Raises:
            RecipeError: it can't be learned.
        """
        if self.planned is None or self.data is None:
            return MaskSet.open(self.place)
        return mask_for(self.planned, self.data, self.place)


def wanted_masks(
    config: MergeConfiguration, points: Sequence[Point], out: Path, options: MergeOptions
) -> tuple[list[WantedMask], list[str]]:
    """Return the mask of each point, the same object for points that share one, and problems.

    Nothing is loaded: models are planned with, and safety data is read.

    Args:
        config: the recipe.
        points: of the frontier.
        out: its folder; masks that have to be learned go there.
        options: mergekit's.
    """
    found: dict[str, WantedMask] = {}
    same: dict[str, WantedMask] = {}
    problems: list[str] = []
    for point in sorted(points, key=lambda point: len(point.learned_with)):
        label = _mask_label(point)
        if label in found:
            continue
        try:
            found[label] = _wanted(config, point, label, out, options, same)
        except RecipeError as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
            found[label] = WantedMask(label, "")
    return [found[_mask_label(point)] for point in points], problems


def relearning_problem(wanted: Sequence[WantedMask], asked: str, out: Path) -> str | None:
    """Return a sentence where masks beside the recipe's own would have to be learned.

    Args:
        wanted: all masks.
        asked: the parameters that ask for them.
        out: the frontier's folder, where records of earlier learning may be.
    """
    missing = [mask for mask in wanted if not mask.is_there()]
    if all(Path(mask.place) == out / OWN_FOLDER for mask in missing):
        return None
    steps = sum(mask.steps for mask in missing)
    counted = f"{len(missing)} masks" if len(missing) > 1 else "1 mask"
    return (
        f"{asked} decides how a mask is learned: {counted} would have to be learned, {steps:,} "
        f"optimiser steps; {_expected_time(missing, out)}. Give --relearn to learn each once, into "
        "a folder of its own; sweep weight, mask_kind, mask_rescale or the fusion's own parameters "
        "to use one mask for all."
    )


def _mask_label(point: Point) -> str:
    given = (point.config.parameters or {}).get(MASK)
    return str(given) if given else values_text(point.learned_with) or RECIPE_LABEL


def _wanted(
    config: MergeConfiguration,
    point: Point,
    label: str,
    out: Path,
    options: MergeOptions,
    same: dict[str, WantedMask],
) -> WantedMask:
    given = (point.config.parameters or {}).get(MASK)
    if given:
        planned = planned_merge(with_mask(config, str(given)), options)
        return WantedMask(label, given_mask(planned, str(given)).path)
    planned = planned_merge(with_values(config, point.learned_with), options)
    key = json_digest(resolved_learning(planned))
    if key not in same:
        folder = out / OWN_FOLDER if not point.learned_with else _folder(out, point.learned_with)
        data = checked_data(planned, date=learning_date(str(folder)))
        same[key] = WantedMask(label, str(folder), planned, data)
    return same[key]


def _folder(out: Path, values: Mapping[str, Any]) -> Path:
    """Return the folder of a mask learned with other values than the recipe's."""
    text = values_text(values)
    name = file_name(text)
    if name != text:
        name = f"{name}-{json_digest(text)[:8]}"
    return out / FURTHER_FOLDER / name


def _expected_time(missing: Sequence[WantedMask], out: Path) -> str:
    """Return how long learning takes, from the record of one that was done here."""
    record = _seconds_a_pair(out)
    if record is None:
        return (
            "how long that takes isn't known yet: `mergekit-somf learn recipe.yml "
            f"{out / OWN_FOLDER}` learns the recipe's own and tells"
        )
    seconds = record * sum(mask.pairs for mask in missing)
    return f"about {_time_text(seconds)}, going by the steps of the masks that are in {out}"


def _seconds_a_pair(out: Path) -> float | None:
    """Return the median seconds of a step for each of its pairs, None where there is no record."""
    found = []
    for folder in [out / OWN_FOLDER, *sorted((out / FURTHER_FOLDER).glob("*"))]:
        if not (folder / MASKS_FILE).exists():
            continue
        settings = MaskSet.open(folder).provenance.get("settings", {})
        batch = settings.get("batch_size") if isinstance(settings, dict) else None
        found += [row["seconds"] / batch for row in training_history(folder) if batch]
    return median(found) if found else None


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(2, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
