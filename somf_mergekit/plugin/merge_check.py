"""The one check of a merge: recipe, models, plan and data, before the first weight is loaded."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import click
import mergekit.merge
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from ..common.errors import RecipeError, noted, raise_together
from ..common.merge_options import SomfOptions
from ..common.process_group import is_first, own_device, started
from ..common.timing import Timer
from ..evaluate.evaluation_sets import EvaluationSets
from ..evaluate.for_recipe import checked_sets
from ..learner.few_bits import few_bits_problem
from ..prepass.learning_data import MaskInputs, merge_inputs
from ..prepass.places import place_problems
from ..prepass.plan import MergedTokenizer, PlannedMerge
from ..prepass.plan_check import plan_problems, unread_problems, unused_filters
from ..prepass.prepass import CHECKING, learning_date
from ..prepass.ties import is_untied, settled_ties, tie_problems
from ..recipe import settings as recipe
from ..recipe.blocks import recipe_text
from ..recipe.presets import for_mergekit
from ..recipe.validate import WRONG_RECIPE, check_recipe, recipe_problems
from ..repairs.catalogue import REPAIRS
from ..repairs.repair_check import repair_problems
from .checkpoint_architecture import architecture_of

ARTIFACT_FOLDER = "somf"
# What says what is wrong with the text of a recipe of each merge method of this package.
OWN_METHODS = {recipe.METHOD_NAME: recipe_problems, **dict.fromkeys(REPAIRS, repair_problems)}


class CheckedMerge(NamedTuple):
    """A merge that can be made.

    Attributes:
        planned: its plan.
        inputs: what its masks are learned from or were given as; None where its method takes none.
        sets: what it is to be measured on; None for nothing.
    """

    planned: PlannedMerge
    inputs: MaskInputs | None
    sets: EvaluationSets | None


def checked_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    problems: Iterable[str] = (),
    *,
    out: str | None = None,
    folder: str | None = None,
    timer: Timer | None = None,
) -> CheckedMerge:
    """Check all that can be known of a merge before the first weight is loaded.

    Args:
        config: a recipe of one of our merge methods.
        options: mergekit's.
        problems: what is known to be wrong already, reported with the rest.
        out: the folder that the merge is written into.
        folder: the folder that its mask is written into.
        timer: gets the seconds of each phase.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    found = [*problems, *place_problems(config, options, out=out, folder=folder)]
    timer = Timer() if timer is None else timer
    with timer.phase("planning"):
        planned, wrong = _planned(config, options, found)
    date = None
    with timer.phase(CHECKING):
        with noted(wrong):
            date = learning_date(folder) if folder else None
        sets = None
        if config.merge_method == recipe.METHOD_NAME:
            sets, unmeasurable = checked_sets(planned.settings, planned.base_model, options)
            wrong += unmeasurable
        return CheckedMerge(planned, merge_inputs(planned, wrong, date), sets)


def planned_merge(config: MergeConfiguration, options: MergeOptions) -> PlannedMerge:
    """Return the plan of a recipe, without running the pre-pass or anything else.

    Raises:
        RecipeError: the recipe is wrong, or mergekit can't plan it.
    """
    planned, problems = _planned(config, options, [])
    raise_together(problems, WRONG_RECIPE)
    return planned


def _planned(
    config: MergeConfiguration, options: MergeOptions, problems: Iterable[str]
) -> tuple[PlannedMerge, list[str]]:
    """Return the plan of a recipe, and what is wrong with it.

    Raises:
        RecipeError: ``problems`` and what else keeps mergekit from planning it.
    """
    check_recipe(config, options, [*problems, *OWN_METHODS[config.merge_method](config)])
    planned = unchecked_plan(config, options)
    learns = planned.config.merge_method == recipe.METHOD_NAME
    wrong = tie_problems(planned)
    wrong += plan_problems(planned) if learns else []
    if learns and planned.learners:
        device = own_device(planned.options.device)
        wrong += filter(None, [few_bits_problem(planned.options.machine, device)])
    if not options.quiet and is_first() and is_untied(planned):
        click.echo(
            "somf: a model has an output head of its own, so the merge's is untied from its "
            "embeddings (tie_word_embeddings: false)",
            err=True,
        )
    return planned, [*wrong, *unused_filters(config, planned)]


def unchecked_plan(config: MergeConfiguration, options: MergeOptions) -> PlannedMerge:
    """Return mergekit's plan of a recipe of any merge method; nothing is checked.

    Raises:
        RecipeError: mergekit can't plan it.
    """
    is_own = config.merge_method in OWN_METHODS
    written = for_mergekit(config)
    try:
        find = architecture_of if is_own else get_architecture_info
        architecture = find(written, options)
        out_config = mergekit.merge._model_out_config(
            written, architecture, trust_remote_code=options.trust_remote_code
        )
        planner = MergePlanner(written, architecture, options, out_config)
        if is_own and planner._tokenizer_task is not None:
            planner._tokenizer_task = MergedTokenizer.of(planner._tokenizer_task)
        MergePlanner._plan.__wrapped__(planner)
    except click.ClickException:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise RecipeError(f"mergekit can't plan this merge: {error}") from error
    if is_own:
        raise_together(unread_problems(planner._tensors), WRONG_RECIPE)
        planner._tensors = settled_ties(planner._tensors, out_config, options)
    return PlannedMerge(
        config=planner.config,
        recipe=recipe_text(config),
        options=SomfOptions.of(options),
        base_model=planner.config.base_model,
        out_config=planner.out_model_config,
        tensors=tuple(planner._tensors),
        tokenizer_task=planner._tokenizer_task,
    )


def processes_problem(config: MergeConfiguration) -> list[str]:
    """Return a sentence where several processes were started to merge."""
    if config.merge_method != recipe.METHOD_NAME or started() == 1:
        return []
    return [
        "several processes were started to merge. Learn the mask with them (`torchrun ... "
        "-m somf_mergekit learn recipe.yml DIR`), then merge in one process, with DIR as "
        "the parameter `mask`"
    ]


def artifact_folder(out: str | None, options: SomfOptions) -> str:
    """Return where the mask of a merge goes that is written to ``out``, None for one in memory."""
    if options.machine.work_dir:
        return os.path.abspath(options.machine.work_dir)
    if out is None:
        # A merge in memory has no output folder: its mask lives as long as the process.
        out = tempfile.mkdtemp(prefix="somf-")
        atexit.register(shutil.rmtree, out, ignore_errors=True)
    return os.path.join(os.path.abspath(out), ARTIFACT_FOLDER)
