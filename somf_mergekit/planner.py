"""The only room that touches mergekit's planner: check recipes, run the pre-pass, hand on masks."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import click
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors import SafetensorError

from . import machine, recipe
from .errors import RecipeError, first_line, raise_together
from .files import is_of_writing
from .headers import checkpoint_problems
from .held_out import warn
from .inputs import CANT_BE_MADE
from .masks import MaskSet
from .method import MASK_TENSOR
from .phases import phase
from .plan import PlannedMerge, mask_name
from .plan_check import plan_problems, unused_filters
from .prepass import mask_for
from .processes import is_first, started
from .provenance import told_settings
from .recipe_blocks import recipe_text
from .recipe_check import OWN_METHODS, WRONG_RECIPE, check_recipe, check_writable, read_recipe
from .report.record import current_record, unmasked
from .report.run import merge_with_report

ARTIFACT_FOLDER = "somf"
_WRAPPED = "_somf_wrapped"


def wrap_planner() -> None:
    """Make mergekit's planner check recipes of our methods, and run somf's pre-pass.

    Safe to repeat.
    """
    for name, wrapper in (("plan_to_disk", _with_folder), ("_plan", _with_checks)):
        original = getattr(MergePlanner, name)
        if not hasattr(original, _WRAPPED):
            wrapped = functools.wraps(original)(wrapper(original))
            setattr(wrapped, _WRAPPED, True)
            setattr(MergePlanner, name, wrapped)


def wrap_run_merge(module: Any) -> None:
    """Make ``module.run_merge`` check recipes of our methods before any model is touched, and
    report on somf merges.

    Safe to repeat.
    """
    original = module.run_merge
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def run_merge(
        merge_config: MergeConfiguration,
        out_path: str,
        options: MergeOptions,
        config_source: str | None = None,
        **further: Any,
    ) -> Any:
        if merge_config.merge_method in OWN_METHODS:
            check_recipe(merge_config, options, config_source)
            check_writable(out_path)

        def merge(config: MergeConfiguration, folder: str, how: MergeOptions) -> Any:
            try:
                return original(config, folder, how, config_source, **further)
            except (OSError, SafetensorError) as error:
                if not is_of_writing(error):
                    raise
                raise RecipeError(
                    f"the merge can't be written to {folder}: {first_line(error)}. Make room, and "
                    "give the same command again: a mask that was learned is kept, and used again."
                ) from error

        if merge_config.merge_method == recipe.METHOD_NAME:
            return merge_with_report(merge, merge_config, out_path, options)
        return merge(merge_config, out_path, options)

    setattr(run_merge, _WRAPPED, True)
    module.run_merge = run_merge


def write_merge(config: MergeConfiguration, out: str, options: MergeOptions) -> None:
    """Write the merge of a recipe into a folder, without a report.

    Raises:
        RecipeError: it can't be made.
    """
    import mergekit.merge

    wrap_run_merge(mergekit.merge)
    # The mask goes into the folder that it belongs to.
    with machine.without_setting("work_dir"):
        merge = mergekit.merge.run_merge.__wrapped__
        merge(config.model_copy(deep=True), out, options, recipe_text(config))


def planned_merge(config: MergeConfiguration, options: MergeOptions) -> PlannedMerge:
    """Return the plan of a recipe, without running the pre-pass or anything else.

    Raises:
        RecipeError: the recipe is wrong, or mergekit can't plan it.
    """
    check_recipe(config, options)
    base = config.base_model.config(trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(
        config.model_copy(deep=True), get_architecture_info(config, options), options, base
    )
    return _planned(planner, MergePlanner._plan.__wrapped__)


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
    config = read_recipe(source)
    if (config.parameters or {}).get("mask"):
        raise RecipeError("parameters.mask is given: there is nothing to learn")
    folder = os.path.abspath(out_dir)
    check_writable(folder)
    planned = planned_merge(config, options)
    return planned, mask_for(planned, folder)


def _with_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    def plan_to_disk(self: MergePlanner, out_path: str) -> Any:
        self._somf_folder = os.path.join(os.path.abspath(out_path), ARTIFACT_FOLDER)
        return original(self, out_path)

    return plan_to_disk


def _with_checks(original: Callable[[MergePlanner], None]) -> Callable[[MergePlanner], None]:
    def plan(self: MergePlanner) -> None:
        method = self.config.merge_method
        if method not in OWN_METHODS:
            original(self)
            return
        if method == recipe.METHOD_NAME and started() > 1:
            raise RecipeError(
                "several processes were started to merge. Learn the mask with them (`torchrun ... "
                "-m somf_mergekit learn recipe.yml DIR`), then merge in one process, with DIR as "
                "the parameter `mask`."
            )
        check_recipe(self.config, self.options)
        with phase("planning"):
            planned = _planned(self, original)
        if method != recipe.METHOD_NAME:
            return
        further: dict[str, Any] = {}
        path = unmasked()
        if path is None:
            folder = _artifact_folder(self)
            masks = mask_for(planned, folder)
            path, record = masks.path, current_record()
            if record is not None:
                record.begin(planned, masks, folder)
        else:
            further = {"exclude": "*"}
        self._tensors = [(w, with_mask(task, path, **further)) for w, task in planned.tensors]

    return plan


def _planned(planner: MergePlanner, plan: Callable[[MergePlanner], None]) -> PlannedMerge:
    given = recipe_text(planner.config)
    original = planner.config.model_copy(deep=True)
    recipe.join_patterns(planner.config)
    recipe.apply_preset(planner.config)
    try:
        plan(planner)
    except click.ClickException:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise RecipeError(f"mergekit can't plan this merge: {error}") from error
    planned = PlannedMerge(
        config=planner.config,
        recipe=given,
        options=planner.options,
        base_model=planner.config.base_model,
        out_config=planner.out_model_config,
        tensors=tuple(planner._tensors),
        tokenizer_task=planner._tokenizer_task,
    )
    learns = planned.config.merge_method == recipe.METHOD_NAME
    problems = plan_problems(planned) if learns else []
    raise_together([*problems, *unused_filters(original, planned)], WRONG_RECIPE)
    if not learns:
        # The pre-pass checks the models of a mask together with its data.
        raise_together(checkpoint_problems(planned), CANT_BE_MADE)
    return planned


def _artifact_folder(planner: MergePlanner) -> str:
    chosen = machine.machine_setting("work_dir")
    if chosen:
        return os.path.abspath(chosen)
    folder = getattr(planner, "_somf_folder", None)
    if folder is None:
        # A merge in memory has no output folder: its mask lives as long as the process.
        parent = tempfile.mkdtemp(prefix="somf-")
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        folder = os.path.join(parent, ARTIFACT_FOLDER)
    return str(folder)


def with_mask(task: ExecuteMergeMethodTask, mask: str, **further: Any) -> ExecuteMergeMethodTask:
    """Return mergekit's task of a tensor with the artifact that it takes its mask from.

    Args:
        task: of a somf recipe.
        mask: the artifact.
        further: parameters that are to be others than the recipe says.
    """
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    fields["parameters"] = {
        **dict(task.parameters.items()),
        "mask": mask,
        MASK_TENSOR: mask_name(task),
        **further,
    }
    return type(task)(**fields)


wrap_planner()
