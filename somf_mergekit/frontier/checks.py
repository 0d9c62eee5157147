"""All that can be wrong with a frontier, found before a model is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from ..errors import RecipeError, raise_together
from ..evaluate.checks import checked_participants
from ..evaluate.recipe_sets import named_sources
from ..evaluate.sets import EvaluationSets, read_sets
from ..evaluate.settings import EvaluationSettings, NamedModel
from ..fusion_check import weights_problem
from ..places import place_problems
from ..plan import PlannedMerge, task_parameters
from ..planner import planned_merge
from ..processes import started
from ..recipe_check import recipe_problems
from ..report.measured import base_of
from .axes import axes_problems
from .making import WORK_FOLDER
from .masks import WantedMask, relearning_problem, wanted_masks
from .over import MASK, WEIGHT, Swept, swept_parameters
from .points import Point, points_of, with_mask, without_measuring

IMPOSSIBLE = "This frontier can't be made"


@dataclass(frozen=True)
class Prepared:
    """A frontier of which nothing is made yet.

    Attributes:
        swept: what is swept.
        base: the aligned base.
        points: its merges.
        plans: the plan of each.
        wanted: the mask of each, the same object where it is the same mask.
    """

    swept: list[Swept]
    base: NamedModel
    points: list[Point]
    plans: list[PlannedMerge]
    wanted: list[WantedMask]


def sets_of(
    config: MergeConfiguration,
    safety: str | None = None,
    harmless: str | None = None,
    pairs: str | None = None,
    skills: Sequence[tuple[str, str]] = (),
) -> tuple[EvaluationSets, list[str]]:
    """Return what a frontier is measured on: what is named here, else the recipe's own sets.

    Args:
        config: the recipe.
        safety: the source of the harmful prompts.
        harmless: of the harmless ones.
        pairs: of the preference pairs.
        skills: names with sources.

    Returns:
        The sets, and why some can't be read, a sentence each.
    """
    given = {k: v for k, v in (config.parameters or {}).items() if isinstance(v, str)}
    own, problems = ([], []) if skills else named_sources(given.get("skill_eval", ""))
    sets, unread = read_sets(
        safety or given.get("safety_eval"),
        harmless or given.get("harmless_eval"),
        pairs or given.get("pairs_eval"),
        skills or own,
    )
    return sets, [*(f"parameters.skill_eval: {problem}" for problem in problems), *unread]


def prepared(
    recipe: MergeConfiguration,
    over: Mapping[str, Sequence[Any]],
    out: Path,
    sets: EvaluationSets,
    settings: EvaluationSettings,
    options: MergeOptions,
    *,
    relearn: bool,
    problems: Sequence[str] = (),
) -> Prepared:
    """Return a frontier's points with their plans and masks.

    Raises:
        RecipeError: ``problems`` and all that is wrong with anything else, together.
    """
    wrong = list(problems)
    if started() > 1:
        wrong.append(
            "several processes were started. Learn the mask with them into the folder `mask` of "
            "--out (`torchrun ... -m somf_mergekit learn recipe.yml DIR/mask`), then give this "
            "command in one process: it finds it there"
        )
    swept, unusable = swept_parameters(over, recipe)
    wrong += unusable
    wrong += [] if problems else axes_problems(sets)
    wrong += place_problems(recipe, options, out=str(out), cleared=str(out / WORK_FOLDER))
    masks = next((s.values for s in swept if s.name == MASK), ())
    if masks and not {MASK, "safety_dataset"} & set(recipe.parameters or {}):
        # A recipe that leaves its mask to be swept.
        recipe = with_mask(recipe, masks[0])
    config = without_measuring(recipe)
    in_text = recipe_problems(recipe)
    points: list[Point] = []
    if not (unusable or in_text):
        points = points_of(config, swept)
        for point in points:
            in_text += recipe_problems(point.config)
    wrong += in_text
    base = None
    if not in_text:
        try:
            base = base_of(planned_merge(config, options))
        except RecipeError as error:
            wrong += error.problems
    try:
        checked_participants([base] if base else [], sets, settings, out, wrong)
    except RecipeError as error:
        wrong = error.problems
    raise_together(wrong, IMPOSSIBLE)
    plans, unplanned = _plans(points, options)
    wanted, unlearnable = wanted_masks(config, points, out, options)
    raise_together([*unplanned, *unlearnable], IMPOSSIBLE)
    asked = ", ".join(s.name for s in swept if s.relearns)
    if asked and not relearn:
        refusal = relearning_problem(list({id(w): w for w in wanted}.values()), asked, out)
        raise_together([refusal] if refusal else [], IMPOSSIBLE)
    return Prepared(swept, cast(NamedModel, base), points, plans, wanted)


def _plans(points: Sequence[Point], options: MergeOptions) -> tuple[list[PlannedMerge], list[str]]:
    """Return the plan of each point, as it is merged, and what is wrong with some of them."""
    plans, problems = [], []
    for point in points:
        # Under which mask is of no matter to the plan.
        config = with_mask(point.config, str((point.config.parameters or {}).get(MASK, "learned")))
        try:
            plans.append(planned_merge(config, options))
        except RecipeError as error:
            problems += [f"{point.label}: {problem}" for problem in error.problems]
            continue
        problems += _weight_problems(point, plans[-1])
    return plans, list(dict.fromkeys(problems))


def _weight_problems(point: Point, planned: PlannedMerge) -> Iterator[str]:
    """Yield a sentence where a factor on the weights changes no tensor."""
    if WEIGHT not in point.values:
        return
    found, tried = None, set()
    for _, task in planned.tensors:
        models = [model for model in task.model_order if model != task.base_model]
        values = task_parameters(task)
        if not models or repr(values) in tried:
            continue
        tried.add(repr(values))
        found = weights_problem(values, models)
        if not found:
            return
    if found:
        yield f"--over weight: {found}"
