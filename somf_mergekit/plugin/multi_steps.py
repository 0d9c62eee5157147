"""A mergekit-multi file: each step is checked before the first one is merged."""

import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from ..common.errors import noted, raise_together
from ..common.merge_options import SomfOptions
from ..data.dataset_reading import dataset_rows
from ..mask.artifact import MaskSet
from ..prepass.places import place_problems
from ..recipe.blocks import parameter_blocks
from ..recipe.recipe_keys import key_problems
from ..recipe.settings import METHOD_NAME, recipe_settings
from ..recipe.validate import WRONG_RECIPE, check_recipe
from .merge_check import OWN_METHODS, artifact_folder, checked_merge
from .planner import WRAPPED

WRONG_STEPS = "These steps are not right"


def wrap_steps(module: Any) -> None:
    """Make mergekit's multimerge script check all steps of our methods first. Safe to repeat."""
    load_config, make_tasks = module.load_config, module.make_tasks
    if hasattr(make_tasks, WRAPPED):
        return

    @functools.wraps(load_config)
    def checked_config(config_source: str, *arguments: Any) -> Any:
        problems = []
        for number, step in enumerate(yaml.compose_all(config_source, Loader=yaml.SafeLoader), 1):
            if _method(step) in OWN_METHODS:
                problems += [f"step {number}: {problem}" for problem in key_problems(step)]
        raise_together(problems, WRONG_STEPS)
        return load_config(config_source, *arguments)

    @functools.wraps(make_tasks)
    def checked_tasks(
        merge_configs: Mapping[str | None, MergeConfiguration],
        dependencies: Mapping[str | None, Collection[str]],
        merge_options: MergeOptions,
        intermediate_dir: str,
        out_path: str | None,
        lazy: bool,
    ) -> Any:
        places = {name: os.path.join(intermediate_dir, name or "") for name in merge_configs}
        places[None] = out_path or ""

        def is_there(name: str | None) -> bool:
            files = [os.path.join(places[name], file) for file in module.MODEL_CHECK_FILENAMES]
            return lazy and any(map(os.path.exists, files))

        problems: list[str] = []
        for name, config in merge_configs.items():
            if config.merge_method in OWN_METHODS and places[name] and not is_there(name):
                awaited = {places[step] for step in dependencies[name] if not is_there(step)}
                with noted(problems, f"{name or 'the last step'}: "):
                    _check_step(config, merge_options, places[name], awaited)
        raise_together(problems, WRONG_STEPS)
        return make_tasks(
            merge_configs, dependencies, merge_options, intermediate_dir, out_path, lazy
        )

    setattr(checked_tasks, WRAPPED, True)
    module.load_config, module.make_tasks = checked_config, checked_tasks


def _check_step(
    config: MergeConfiguration, options: MergeOptions, out: str, awaited: Collection[str]
) -> None:
    """Check a step as far as can be known before others have written what it takes.

    Args:
        config: its recipe.
        options: mergekit's.
        out: its folder.
        awaited: folders of models that are not there yet.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    options = SomfOptions.of(options)
    folder = artifact_folder(out, options)
    if not awaited:
        checked_merge(config, options, out=out, folder=folder)
        return
    problems = place_problems(config, options, out=out, folder=folder)
    problems += OWN_METHODS[config.merge_method](config)
    check_recipe(config, options, problems, awaited)
    if config.merge_method == METHOD_NAME:
        settings, unread = recipe_settings(config), list[str]()
        for mask in {block["mask"] for _, block, _ in parameter_blocks(config) if "mask" in block}:
            with noted(unread):
                if not any(str(mask).startswith(step) for step in awaited):
                    MaskSet.open(mask, options.transformers_cache)
        for source, split, part in (
            (settings.safety_dataset, settings.safety_split, settings.safety_config),
            (settings.utility_dataset, settings.utility_split, settings.utility_config),
        ):
            with noted(unread):
                if source:
                    dataset_rows(source, split, part)
        raise_together(unread, WRONG_RECIPE)


def _method(step: yaml.Node) -> str | None:
    """Return which merge method a step of a file asks for."""
    pairs = step.value if isinstance(step, yaml.MappingNode) else []
    return next((v.value for k, v in pairs if k.value == "merge_method"), None)
