"""A sweep of which nothing is made yet, and everything that can be wrong with it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ...common.errors import RecipeError, noted, raise_together
from ...common.process_group import started
from ...data.rendering import Rendering
from ...plugin.merge_check import planned_merge
from ...prepass.places import place_problems
from ...prepass.plan import PlannedMerge, task_parameters
from ...recipe.blocks import recipe_text
from ...recipe.fusion_check import weights_problem
from ...recipe.model_check import check_models
from ...recipe.settings import recipe_settings
from ...recipe.validate import recipe_problems
from ..evaluation_sets import EvaluationSets
from ..evaluation_settings import EvaluationSettings, NamedModel
from ..for_recipe import base_of
from ..measured_models import named_model
from ..runner import checked_participants
from .scoring import TEST, VALIDATION, Axes, Rule
from .sweep_file import MERGED, read_file
from .variants import (
    BASE_LABEL,
    MASK,
    WEIGHT,
    Swept,
    Variant,
    swept_parameters,
    values_text,
    variants_of,
    with_values,
    without_measuring,
)
from .wanted_masks import WantedMask, relearning_problem, wanted_masks

IMPOSSIBLE = "This sweep can't be made"
# In the folder of a sweep: what is being made, and goes.
WORK = "merging"


@dataclass(frozen=True)
class PlannedSweep:
    """A sweep of which nothing is made yet.

    Attributes:
        base: the aligned base.
        variants: the models that are compared with it.
        sets: what models are measured on, by split.
        settings: how.
        masks: by what variants call them.
        rule: how settings are chosen on validation.
        tune_seeds: on whose validation they are; empty for each entry's first.
        notes: what was swept and what follows from it, in words.
    """

    base: NamedModel
    variants: Sequence[Variant]
    sets: Mapping[str, EvaluationSets]
    settings: EvaluationSettings
    masks: Mapping[str, WantedMask] = field(default_factory=dict)
    rule: Rule = field(default_factory=Rule)
    tune_seeds: Sequence[int] = ()
    notes: Sequence[str] = ()


def planned_recipe(
    recipe: MergeConfiguration,
    over: Mapping[str, Sequence[Any]],
    out: Path,
    sets: EvaluationSets,
    settings: EvaluationSettings,
    options: MergeOptions,
    *,
    relearn: bool,
    problems: Sequence[str],
) -> PlannedSweep:
    """Return the sweep of a somf recipe's parameters; see ``sweeping.sweep``.

    Raises:
        RecipeError: ``problems`` and all that is wrong with anything else, together.
    """
    wrong = [] if over else ["nothing is swept: name a parameter with --over KEY=VALUE,..."]
    swept, unusable = swept_parameters(over, recipe)
    masks = next((s.values for s in swept if s.name == MASK), ())
    if masks and not {MASK, "safety_dataset"} & set(recipe.parameters or {}):
        # A recipe that leaves its mask to be swept.
        recipe = with_values(recipe, {MASK: masks[0]})
    variants: list[Variant] = []
    base = NamedModel(BASE_LABEL, "")
    in_text = recipe_problems(recipe)
    if not (unusable or in_text):
        variants = variants_of(without_measuring(recipe), swept)
        in_text = [p for variant in variants for p in recipe_problems(variant.recipes[0])]
    if not in_text:
        settings = replace(settings, rendering=Rendering(recipe_settings(recipe).template_keywords))
        with noted(wrong):
            planned = planned_merge(without_measuring(recipe), options)
            base = base_of(planned.base_model, options)
    found = PlannedSweep(base, variants, {TEST: sets}, settings)
    found = _checked(found, [*wrong, *unusable, *in_text], problems, out, options)
    asked = ", ".join(s.name for s in swept if s.relearns)
    refusal = relearning_problem(found.masks.values(), asked, out) if asked else None
    raise_together([refusal] if refusal and not relearn else [], IMPOSSIBLE)
    return replace(found, notes=list(_swept_notes(swept, found.masks)))


def planned_file(
    content: Mapping[str, Any],
    out: Path,
    settings: EvaluationSettings,
    options: MergeOptions,
    problems: Sequence[str],
) -> PlannedSweep:
    """Return the sweep that a file describes; see ``sweeping.sweep``.

    Raises:
        RecipeError: ``problems`` and all that is wrong with anything else, together.
    """
    file = read_file(content)
    variants, wrong = file.variants()
    unread, sets = list(problems), {}
    for name, sources in {TEST: file.measure, VALIDATION: file.validation}.items():
        if sources:
            sets[name], of_split = sources.read()
            unread += of_split
    LoaderCache().setup(options=options)
    for recipe in {recipe_text(r): r for v in variants for r in v.recipes}.values():
        models = [model for model in recipe.referenced_models() if str(model) != MERGED]
        with noted(wrong):
            check_models(models, recipe.base_model, options, [], IMPOSSIBLE)
    found = PlannedSweep(
        NamedModel(BASE_LABEL, named_model(file.base_model).source),
        variants,
        sets,
        file.measuring.of(settings),
        rule=Rule(file.reference, file.skill_kept, file.over_refusals),
        tune_seeds=file.tune_seeds,
    )
    return _checked(found, wrong, unread, out, options)


def _checked(
    found: PlannedSweep,
    wrong: Sequence[str],
    unread: Sequence[str],
    out: Path,
    options: MergeOptions,
) -> PlannedSweep:
    """Return a sweep with its masks, or raise what is wrong; ``unread`` is that of the sets."""
    wrong = [*unread, *wrong]
    if started() > 1:
        wrong.append(
            "several processes were started. Learn the mask with them into the folder `mask` of "
            "--out (`torchrun ... -m somf_mergekit learn recipe.yml DIR/mask`), then give this "
            "command in one process: it finds it there"
        )
    # What could not be read is not missing.
    wrong += [] if unread else _set_problems(found.sets)
    # Where it could not be found, that is wrong already.
    models = [found.base] if found.base.source else []
    ready = {variant.model: variant.label for variant in found.variants if variant.model}
    models += [NamedModel(f"{label} ({source})", source) for source, label in ready.items()]
    for recipe in (recipe for variant in found.variants for recipe in variant.recipes):
        wrong += place_problems(recipe, options, out=str(out), cleared=str(out / WORK))
    try:
        checked_participants(models, found.sets[TEST], found.settings, out, wrong)
    except RecipeError as error:
        raise_together(error.problems, IMPOSSIBLE)
    problems: list[str] = []
    variants = [variant for variant in found.variants if variant.takes_mask]
    for variant in variants:
        # Under which mask is of no matter to the plan.
        config = with_values(variant.recipes[0], {MASK: variant.mask})
        with noted(problems, f"{variant.label}: "):
            problems += _weight_problems(variant, planned_merge(config, options))
    masks, unlearnable = wanted_masks(variants, out, options)
    raise_together([*problems, *unlearnable], IMPOSSIBLE)
    limited = {name: sets.limited(found.settings.limit) for name, sets in found.sets.items()}
    return replace(found, masks=masks, sets=limited)


def _set_problems(sets: Mapping[str, EvaluationSets]) -> Iterator[str]:
    """Yield a sentence for what is missing, and for prompts that both splits have."""
    asked: dict[str, set[str]] = {VALIDATION: set()}
    for name, of in sets.items():
        where = "" if name == TEST else f"{name}: "
        yield from (where + problem for problem in Axes(of).problems())
        prompts = [prompt for asked in of.asked.values() for prompt in asked]
        prompts += [messages for skill in of.skills for messages, _ in skill.examples]
        prompts += [pair.messages for pair in of.pairs]
        asked[name] = {prompt[-1]["content"] for prompt in prompts}
    shared = asked[TEST] & asked[VALIDATION]
    if shared:
        yield f"validation and measure have {len(shared)} prompts in common: they must have none"


def _weight_problems(variant: Variant, planned: PlannedMerge) -> list[str]:
    """Return a sentence where a factor on the weights changes no tensor."""
    if WEIGHT not in variant.values or len(variant.recipes) > 1:
        return []
    tried: dict[str, str | None] = {}
    for _, task in planned.tensors:
        models = [model for model in task.model_order if model != task.base_model]
        values = task_parameters(task)
        if models and repr(values) not in tried:
            tried[repr(values)] = weights_problem(values, models)
    wrong = [problem for problem in tried.values() if problem]
    return [f"--over weight: {wrong[0]}"] if wrong and len(wrong) == len(tried) else []


def _swept_notes(swept: Sequence[Swept], masks: Mapping[str, WantedMask]) -> Iterator[str]:
    for one in swept:
        values = ", ".join(values_text({"": value})[1:] for value in one.values)
        factor = "all weights of the recipe multiplied by " if one.name == WEIGHT else ""
        learned = "; a mask was learned for each" if one.relearns else ""
        yield f"{one.name}: {factor}{values}{learned}"
    applied = ", ".join(one.name for one in swept if not one.relearns)
    if applied and any(mask.learning for mask in masks.values()):
        yield f"masks were learned with the recipe's own {applied}, and applied with the others too"
