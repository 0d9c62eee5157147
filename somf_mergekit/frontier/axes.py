"""What a frontier measures: safety along one axis, skill along the other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..evaluate.evaluation import Estimate, Evaluation
from ..evaluate.sets import HARMFUL, HARMLESS, PAIRS, EvaluationSets
from ..evaluate.table import finite

REFUSALS, LOSS, ACCURACY = "refusals (phrases)", "loss", "preference accuracy"
# Measures of one model, by set and name: value, its interval, and both for the difference to the
# base.
Found = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Axes:
    """The axes, as the sets allow.

    Attributes:
        has_prompts: whether safety is refusals; else it is the preference accuracy.
        has_harmless: whether over-refusals are taken off.
        skills: whose losses make up the skill.
    """

    has_prompts: bool
    has_harmless: bool
    skills: tuple[str, ...]

    @property
    def safety_text(self) -> str:
        """What safety is."""
        if not self.has_prompts:
            return "preference accuracy"
        return "refusals minus over-refusals" if self.has_harmless else "refusals"

    @property
    def safety_unit(self) -> str:
        """What a hundredth of safety is."""
        return "points" if self.has_prompts and self.has_harmless else "%"

    @property
    def skill_text(self) -> str:
        """What skill is."""
        of = self.skills[0] if len(self.skills) == 1 else f"mean of {', '.join(self.skills)}"
        return f"loss below the aligned base's, {of}"

    @property
    def columns(self) -> dict[str, tuple[str, str]]:
        """The measures behind the axes: headings with set and measure."""
        found = {"refusals": (HARMFUL, REFUSALS)} if self.has_prompts else {}
        if self.has_harmless:
            found["over-refusals"] = (HARMLESS, REFUSALS)
        return found | {f"{skill} loss": (skill, LOSS) for skill in self.skills}

    def place(self, found: Found) -> tuple[float, float] | None:
        """Return (safety, skill) of a model, None where it could not be measured."""
        if self.has_prompts:
            parts = [value(found, HARMFUL, REFUSALS)]
            parts += [value(found, HARMLESS, REFUSALS)] if self.has_harmless else []
        else:
            parts = [value(found, PAIRS, ACCURACY)]
        gains = [value(found, skill, LOSS, of_difference=True) for skill in self.skills]
        if None in parts or None in gains:
            return None
        safety, *taken_off = [part for part in parts if part is not None]
        # The base's gain is 0, not -0.
        return safety - sum(taken_off), 0.0 - mean(gain for gain in gains if gain is not None)


def axes_of(sets: EvaluationSets) -> Axes:
    """Return the axes that the sets allow; ``axes_problems`` says where they allow none."""
    return Axes(
        has_prompts=bool(sets.harmful),
        has_harmless=bool(sets.harmful and sets.harmless),
        skills=tuple(skill.name for skill in sets.skills),
    )


def axes_problems(sets: EvaluationSets) -> Iterable[str]:
    """Yield a sentence for each axis that has no set."""
    if not (sets.harmful or sets.pairs):
        yield (
            "there is nothing to measure safety on: give harmful prompts (--safety, or "
            "parameters.safety_eval) or safety pairs (--pairs, or parameters.pairs_eval)"
        )
    if not sets.skills:
        yield (
            "there is nothing to measure skill on: give prompts with right answers (--skill "
            "NAME=FILE, or parameters.skill_eval)"
        )


def found_measures(evaluation: Evaluation, model: str) -> dict[str, dict[str, Any]]:
    """Return what was measured of a model, as JSON: numbers that are not finite are None."""
    is_first = model == next(iter(evaluation.models))
    nothing = Estimate(0.0, None) if is_first else Estimate(None, None)
    found = {}
    for row in evaluation.rows:
        if model in row.estimates:
            own, apart = row.estimates[model], row.differences.get(model, nothing)
            found[f"{row.measure.set}: {row.measure.name}"] = {
                "value": finite(own.value),
                "interval": _finite_interval(own),
                "difference": finite(apart.value),
                "difference_interval": _finite_interval(apart),
            }
    return found


def value(found: Found, set_name: str, measure: str, *, of_difference: bool = False) -> Any:
    """Return a measure, or its difference to the base; None where there is none."""
    row = found.get(f"{set_name}: {measure}", {})
    return row.get("difference" if of_difference else "value")


def _finite_interval(estimate: Estimate) -> list[float | None] | None:
    return None if estimate.interval is None else list(map(finite, estimate.interval))
