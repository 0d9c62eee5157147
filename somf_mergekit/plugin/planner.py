"""The only room that touches mergekit's planner: check recipes, run the pre-pass, hand on masks."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mergekit.merge
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import PrivateAttr
from safetensors import SafetensorError

from ..common import machine
from ..common.errors import RecipeError, first_line, noted, raise_together
from ..common.files import is_of_writing
from ..common.process_group import is_first, started
from ..common.timing import phase, timed
from ..data.held_out import warn
from ..mask.artifact import MaskSet
from ..prepass.forecast import merge_bytes
from ..prepass.learning_data import MergeInputs, merge_inputs
from ..prepass.merged_tokenizer import MergedTokenizer
from ..prepass.places import File, check_room, place_problems, weight_bytes
from ..prepass.plan import PlannedMerge, mask_name, with_fields
from ..prepass.plan_check import plan_problems, unread_problems, unused_filters
from ..prepass.prepass import CHECKING, learning_date, mask_for
from ..prepass.provenance import told_settings
from ..prepass.ties import as_written, copy_ties, is_untied, settled_ties, tie_problems
from ..recipe import settings as recipe
from ..recipe.blocks import recipe_text
from ..recipe.recipe_keys import key_problems
from ..recipe.validate import OWN_METHODS, WRONG_RECIPE, check_recipe, recipe_and_problems
from ..report.card import write_card
from ..report.merge_report import merge_with_report
from .method import MASK_TENSOR, OBSERVER

ARTIFACT_FOLDER = "somf"
# Marks what of mergekit is wrapped already.
WRAPPED = "_somf_wrapped"


class ReadyRecipe(MergeConfiguration):
    """A recipe that was checked and planned: mergekit's planner takes its tasks from it.

    mergekit hands the recipe that ``run_merge`` gets on to its planner.
    """

    _planned: PlannedMerge = PrivateAttr()


def wrap_planner() -> None:
    """Make mergekit's planner check recipes of our methods, and run somf's pre-pass.

    Safe to repeat.
    """
    original = MergePlanner._plan
    if not hasattr(original, WRAPPED):
        wrapped = functools.wraps(original)(_with_checks(original))
        setattr(wrapped, WRAPPED, True)
        MergePlanner._plan = wrapped


def wrap_run_merge(module: Any) -> None:
    """Make ``module.run_merge`` check recipes of our methods before any model is touched, learn
    masks, and report on somf merges.

    Safe to repeat.
    """
    original = module.run_merge
    if hasattr(original, WRAPPED):
        return

    @functools.wraps(original)
    def run_merge(
        merge_config: MergeConfiguration,
        out_path: str,
        options: MergeOptions,
        config_source: str | None = None,
        **further: Any,
    ) -> Any:
        if merge_config.merge_method not in OWN_METHODS:
            return original(merge_config, out_path, options, config_source, **further)
        # mergekit writes into the recipe that it is given.
        config = merge_config.model_copy(deep=True)
        text = config_source or recipe_text(config)

        def merge(planned: PlannedMerge, folder: str, how: MergeOptions) -> Any:
            with _told_of_writing(folder):
                return _merged(original, config, planned, folder, how, text, **further)

        with timed() as seconds:
            folder = artifact_folder(out_path)
            found = [*_processes_problem(config), *key_problems(config_source or "")]
            planned, inputs = checked_merge(config, options, found, out=out_path, folder=folder)
            if inputs is None:
                check_room(_files(planned, out_path))
                return merge(planned, out_path, options)
            with _told_of_writing(folder):
                masks = mask_for(planned, inputs, folder, _files(planned, out_path))

            def write(to: str, how: MergeOptions, *, observer: Any, is_masked: bool) -> Any:
                ready = with_masks(planned, masks, is_masked=is_masked, observer=observer)
                return merge(ready, to, how)

            return merge_with_report(write, planned, masks, folder, out_path, seconds)

    setattr(run_merge, WRAPPED, True)
    module.run_merge = run_merge


def write_merge(
    config: MergeConfiguration,
    planned: PlannedMerge,
    masks: MaskSet,
    out: str,
    options: MergeOptions,
    *,
    is_masked: bool,
) -> None:
    """Write a merge that was planned into a folder, without a report.

    Args:
        config: the recipe.
        planned: its plan.
        masks: its mask, kept in ``out``; for a merge without a mask any of the same models.
        out: the folder.
        options: mergekit's.
        is_masked: whether tensors get their masks.

    Raises:
        RecipeError: it can't be made.
    """
    if is_masked:
        masks = mask_for(planned, masks, os.path.join(os.path.abspath(out), ARTIFACT_FOLDER))
    ready = with_masks(planned, masks, is_masked=is_masked)
    with _told_of_writing(out):
        run_merge = mergekit.merge.run_merge.__wrapped__
        _merged(run_merge, config, ready, out, options, recipe_text(config))


def _merged(
    run_merge: Callable[..., Any],
    config: MergeConfiguration,
    planned: PlannedMerge,
    folder: str,
    options: MergeOptions,
    text: str,
    **further: Any,
) -> Any:
    """Return what mergekit's ``run_merge`` returns of a planned merge, and write its model card."""
    without = options.model_copy(update={"write_model_card": False})
    result = run_merge(_ready(config, planned), folder, without, text, **further)
    if options.write_model_card:
        write_card(config, text, Path(folder))
    return result


def planned_merge(config: MergeConfiguration, options: MergeOptions) -> PlannedMerge:
    """Return the plan of a recipe, without running the pre-pass or anything else.

    Raises:
        RecipeError: the recipe is wrong, or mergekit can't plan it.
    """
    planned, problems = _planned(config, options, [])
    raise_together(problems, WRONG_RECIPE)
    return planned


def checked_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    problems: Iterable[str] = (),
    *,
    out: str | None = None,
    folder: str | None = None,
) -> tuple[PlannedMerge, MergeInputs]:
    """Check all that can be known of a merge before the first weight is loaded.

    Args:
        config: a recipe of one of our merge methods.
        options: mergekit's.
        problems: what is known to be wrong already, reported with the rest.
        out: the folder that the merge is written into.
        folder: the folder that its mask is written into.

    Returns:
        The plan, and what its masks are learned from or were given as; None where the method
        takes none.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    found = [*problems, *place_problems(config, options, out=out, folder=folder)]
    with phase("planning"):
        planned, wrong = _planned(config, options, found)
    date = None
    with phase(CHECKING):
        with noted(wrong):
            date = learning_date(folder) if folder else None
        return planned, merge_inputs(planned, wrong, date)


def learn(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    options: MergeOptions | None = None,
) -> MaskSet:
    """Learn the mask of a recipe, without merging.

    Args:
        source: a recipe's file, its YAML text, or the mapping in it.
        out_dir: becomes the artifact's folder; a mask learned there from the same recipe, models
            and data is used again.
        options: mergekit's options (device, caches, trust_remote_code).

    Raises:
        RecipeError: the recipe, its models or its data are wrong.
    """
    planned, masks = planned_and_learned(source, out_dir, options or MergeOptions())
    if is_first():
        warn(masks.provenance, told_settings(planned)["mask_kind"])
    return masks


def planned_and_learned(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    options: MergeOptions,
) -> tuple[PlannedMerge, MaskSet]:
    """Return the plan of a recipe and its mask; see ``learn``."""
    config, problems = recipe_and_problems(source)
    if (config.parameters or {}).get("mask"):
        raise RecipeError("parameters.mask is given: there is nothing to learn")
    folder = os.path.abspath(out_dir)
    planned, inputs = checked_merge(config, options, problems, folder=folder)
    if inputs is None:
        raise RecipeError(f"{config.merge_method} has no mask: there is nothing to learn")
    return planned, mask_for(planned, inputs, folder)


def _with_checks(original: Callable[[MergePlanner], None]) -> Callable[[MergePlanner], None]:
    def plan(self: MergePlanner) -> None:
        if self.config.merge_method not in OWN_METHODS:
            original(self)
            return
        if isinstance(self.config, ReadyRecipe):
            planned = self.config._planned
        else:
            # Not by run_merge, as where models are merged in memory.
            folder, found = artifact_folder(None), _processes_problem(self.config)
            planned, inputs = checked_merge(self.config, self.options, found, folder=folder)
            if inputs is not None:
                planned = with_masks(planned, mask_for(planned, inputs, folder))
        self._tensors = [(weight, as_written(weight, task)) for weight, task in planned.tensors]
        copy_ties(planned.out_config, self.out_model_config)
        self._tokenizer_task = planned.tokenizer_task

    return plan


def _planned(
    config: MergeConfiguration, options: MergeOptions, problems: Iterable[str]
) -> tuple[PlannedMerge, list[str]]:
    """Return the plan of a recipe, and what is wrong with it as far as that tells.

    Raises:
        RecipeError: ``problems`` and what else keeps mergekit from planning it.
    """
    check_recipe(config, options, problems)
    planned = unchecked_plan(config, options)
    learns = planned.config.merge_method == recipe.METHOD_NAME
    wrong = tie_problems(planned)
    wrong += plan_problems(planned) if learns else []
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
    written = config.model_copy(deep=True)
    recipe.join_patterns(written)
    recipe.apply_preset(written)
    try:
        architecture = get_architecture_info(written, options)
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
        options=options,
        base_model=planner.config.base_model,
        out_config=planner.out_model_config,
        tensors=tuple(planner._tensors),
        tokenizer_task=planner._tokenizer_task,
    )


def _ready(config: MergeConfiguration, planned: PlannedMerge) -> ReadyRecipe:
    """Return a recipe of which mergekit takes the plan as it is."""
    ready = ReadyRecipe.model_construct(
        **{name: getattr(config, name) for name in MergeConfiguration.model_fields}
    )
    ready._planned = planned
    return ready


@contextmanager
def _told_of_writing(folder: str) -> Iterator[None]:
    """Say what to do where a file of a merge can't be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_of_writing(error):
            raise
        raise RecipeError(
            f"the merge can't be written to {folder}: {first_line(error)}. Make room, and "
            "give the same command again: a mask that was learned is kept, and used again."
        ) from error


def _files(planned: PlannedMerge, out: str) -> list[File]:
    """Return what a merge writes into its folder and, to measure it, beside that."""
    size = merge_bytes(planned)
    files = [("the merge", out, size - weight_bytes(out))]
    is_measured = planned.config.merge_method == recipe.METHOD_NAME and not (
        planned.evaluation_sets[0].is_empty
    )
    if is_measured:
        files.append(("the plain fusion, to measure", os.path.dirname(os.path.abspath(out)), size))
    return files


def _processes_problem(config: MergeConfiguration) -> list[str]:
    """Return a sentence where several processes were started to merge."""
    if config.merge_method != recipe.METHOD_NAME or started() == 1:
        return []
    return [
        "several processes were started to merge. Learn the mask with them (`torchrun ... "
        "-m somf_mergekit learn recipe.yml DIR`), then merge in one process, with DIR as "
        "the parameter `mask`"
    ]


def artifact_folder(out: str | None) -> str:
    """Return where the mask of a merge goes that is written to ``out``, None for one in memory."""
    chosen = machine.machine_setting("work_dir")
    if chosen:
        return os.path.abspath(chosen)
    if out is None:
        # A merge in memory has no output folder: its mask lives as long as the process.
        out = tempfile.mkdtemp(prefix="somf-")
        atexit.register(shutil.rmtree, out, ignore_errors=True)
    return os.path.join(os.path.abspath(out), ARTIFACT_FOLDER)


def with_masks(
    planned: PlannedMerge, masks: MaskSet, *, is_masked: bool = True, observer: Any = None
) -> PlannedMerge:
    """Return a plan whose tasks take their masks from ``masks``, or none of them.

    Without its masks a merge is the same in everything else, what it draws at random included.
    ``observer`` is what the merge method shows task vectors to, see ``report.vectors``.
    """
    further = {OBSERVER: observer, **({} if is_masked else {"exclude": "*"})}
    tensors = ((weight, with_mask(task, masks.path, **further)) for weight, task in planned.tensors)
    return replace(planned, tensors=tuple(tensors))


def with_mask(task: ExecuteMergeMethodTask, mask: str, **further: Any) -> ExecuteMergeMethodTask:
    """Return mergekit's task of a tensor with the artifact that it takes its mask from.

    Args:
        task: of a somf recipe.
        mask: the artifact.
        further: parameters that are to be others than the recipe says.
    """
    parameters = dict(task.parameters.items())
    own = {"mask": mask, MASK_TENSOR: mask_name(task), **further}
    return with_fields(task, parameters=parameters | own)


wrap_planner()
