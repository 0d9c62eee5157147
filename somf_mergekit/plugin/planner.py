"""The only room that touches mergekit's planner: check recipes, run the pre-pass, hand on masks."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mergekit.merge
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import PrivateAttr
from safetensors import SafetensorError

from ..common.errors import RecipeError, first_line
from ..common.files import is_of_writing
from ..common.merge_options import SomfOptions
from ..common.process_group import is_first
from ..common.timing import Timer
from ..data.held_out import warn
from ..evaluate.for_recipe import asks_to_be_measured
from ..mask.artifact import MaskSet
from ..mask.writing import copy_masks
from ..prepass.forecast import merge_bytes
from ..prepass.headers import aligned_vocabulary
from ..prepass.places import File, check_room, weight_bytes
from ..prepass.plan import PlannedMerge, with_masks
from ..prepass.prepass import mask_for
from ..prepass.provenance import provenance_of_use, recorded_settings
from ..prepass.ties import as_written, copy_ties
from ..recipe import settings as recipe
from ..recipe.blocks import recipe_text
from ..recipe.recipe_keys import key_problems
from ..recipe.validate import recipe_and_problems
from ..report.card import write_card
from ..report.merge_report import merge_with_report
from .merge_check import (
    ARTIFACT_FOLDER,
    OWN_METHODS,
    artifact_folder,
    checked_merge,
    processes_problem,
)

# Marks what of mergekit is wrapped already.
WRAPPED = "_somf_wrapped"
# How images, sound and video become inputs: mergekit copies it for the classes that it defines.
_OF_PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class ReadyRecipe(MergeConfiguration):
    """A recipe that was planned: mergekit hands it on to its planner, which takes its tasks."""

    _planned: PlannedMerge = PrivateAttr()


def wrap_planner() -> None:
    """Make mergekit's planner check recipes of our methods, and run somf's pre-pass.

    Safe to repeat.
    """
    original = MergePlanner._plan
    if hasattr(original, WRAPPED):
        return

    @functools.wraps(original)
    def plan(self: MergePlanner) -> None:
        if self.config.merge_method not in OWN_METHODS:
            original(self)
            return
        if isinstance(self.config, ReadyRecipe):
            planned = self.config._planned
        else:
            # Not by run_merge, as where models are merged in memory.
            options = SomfOptions.of(self.options)
            folder, found = artifact_folder(None, options), processes_problem(self.config)
            planned, inputs, _ = checked_merge(self.config, options, found, folder=folder)
            if inputs is not None:
                planned = with_masks(planned, mask_for(planned, inputs, folder))
        self._tensors = [(weight, as_written(weight, task)) for weight, task in planned.tensors]
        copy_ties(planned.out_config, self.out_model_config)
        tokens = aligned_vocabulary(planned)
        if tokens is not None:
            # mergekit doesn't know every place where a configuration has it.
            self.out_model_config.get_text_config().vocab_size = tokens
        self._tokenizer_task = planned.tokenizer_task

    setattr(plan, WRAPPED, True)
    MergePlanner._plan = plan


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
            with _writing_to(folder):
                return _merged(original, config, planned, folder, how, text, **further)

        timer = Timer()
        options = SomfOptions.of(options)
        folder = artifact_folder(out_path, options)
        found = [*processes_problem(config), *key_problems(config_source or "")]
        planned, inputs, sets = checked_merge(
            config, options, found, out=out_path, folder=folder, timer=timer
        )
        if inputs is None:
            check_room(_files(planned, out_path))
            return merge(planned, out_path, options)
        with _writing_to(folder):
            masks = mask_for(planned, inputs, folder, _files(planned, out_path), timer)

            def write(to: str, how: MergeOptions, *, observer: Any, is_masked: bool) -> Any:
                ready = with_masks(planned, masks, is_masked=is_masked, observer=observer)
                return merge(ready, to, how)

        return merge_with_report(write, planned, masks, sets, folder, out_path, timer)

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
        masks: its mask, stored in ``out``; for a merge without a mask any of the same models.
        out: the folder.
        options: mergekit's.
        is_masked: whether tensors get their masks.

    Raises:
        RecipeError: it can't be made.
    """
    if is_masked:
        folder = os.path.join(os.path.abspath(out), ARTIFACT_FOLDER)
        record = {**provenance_of_use(planned, {}), "origin": masks.provenance}
        masks = copy_masks(folder, masks, record)
    ready = with_masks(planned, masks, is_masked=is_masked)
    with _writing_to(out):
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
    base = LoaderCache().get(planned.base_model).index.base_path
    for name in _OF_PROCESSOR:
        if os.path.isfile(os.path.join(base, name)):
            shutil.copy(os.path.join(base, name), folder)
    if options.write_model_card:
        write_card(config, text, Path(folder))
    return result


def merge(file: str, out_path: str, options: SomfOptions) -> None:
    """Merge a recipe's file into a folder, as ``mergekit-yaml`` does.

    Raises:
        RecipeError: the recipe, its models or its data are wrong, or the merge can't be written.
    """
    # What can't be read at all; the merge reports everything else.
    config, _ = recipe_and_problems(file, OWN_METHODS)
    text = Path(file).read_text(encoding="utf-8")
    mergekit.merge.run_merge(config, out_path, options, text)


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
        options: mergekit's options (device, caches, trust_remote_code), or ``SomfOptions``, which
            has the machine's too; else these are read from the environment.

    Raises:
        RecipeError: the recipe, its models or its data are wrong.
    """
    planned, masks = plan_and_mask(source, out_dir, SomfOptions.of(options or MergeOptions()))
    warn_of(planned, masks)
    return masks


def plan_and_mask(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    options: SomfOptions,
) -> tuple[PlannedMerge, MaskSet]:
    """Return the plan of a recipe and its mask; see ``learn``."""
    config, problems = recipe_and_problems(source)
    if (config.parameters or {}).get("mask") and "safety_dataset" not in config.parameters:
        raise RecipeError("parameters.mask is given: there is nothing to learn")
    folder = os.path.abspath(out_dir)
    planned, inputs, _ = checked_merge(config, options, problems, folder=folder)
    assert inputs is not None  # somf always has some
    if inputs.data is None:
        raise RecipeError("each model's mask is given: there is nothing to learn")
    return planned, mask_for(planned, inputs, folder)


def warn_of(planned: PlannedMerge, masks: MaskSet) -> None:
    """Warn where held-out pairs don't speak for a mask: the last words, of the first process."""
    if is_first():
        warn(masks.provenance, recorded_settings(planned)["mask_kind"])


def _ready(config: MergeConfiguration, planned: PlannedMerge) -> ReadyRecipe:
    """Return a recipe of which mergekit takes the plan as it is."""
    ready = ReadyRecipe.model_construct(
        **{name: getattr(config, name) for name in MergeConfiguration.model_fields}
    )
    ready._planned = planned
    return ready


@contextmanager
def _writing_to(folder: str) -> Iterator[None]:
    """Say what to do where a file of a merge can't be written.

    Raises:
        RecipeError: it can't.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_of_writing(error):
            raise
        raise RecipeError(
            f"the merge can't be written to {folder}: {first_line(error)}. Make room, and "
            "give the same command again: a mask that was learned is stored, and used again."
        ) from error


def _files(planned: PlannedMerge, out: str) -> list[File]:
    """Return what a merge writes into its folder and, to measure it, beside that."""
    size = merge_bytes(planned)
    files = [("the merge", out, size - weight_bytes(out))]
    is_somf = planned.config.merge_method == recipe.METHOD_NAME
    if is_somf and asks_to_be_measured(planned.settings):
        files.append(("the plain fusion, to measure", os.path.dirname(os.path.abspath(out)), size))
    return files


wrap_planner()
