"""Check what a merge has written: its mask, whose that is, and tensors computed once more."""

import os
from collections.abc import Iterator

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from . import machine, recipe
from .errors import RecipeError, first_line
from .masks import MaskSet
from .recipe_check import OWN_METHODS, read_recipe
from .sources import content_fingerprint
from .verify_tensors import (
    RIGHT,
    UNCHECKED,
    WRONG,
    Check,
    in_a_line,
    tensor_checks,
)

RECIPE_FILE = "mergekit_config.yml"


def checks(folder: str, options: MergeOptions, sample: int | None) -> Iterator[Check]:
    """Yield what is found of a merge's output, one check after another.

    Args:
        folder: what the merge has written.
        options: mergekit's, as the merge was made with.
        sample: how many tensors are computed once more; None for all.
    """
    config, masks = None, None
    try:
        config = read_recipe(os.path.join(folder, RECIPE_FILE), OWN_METHODS)
        yield Check("recipe", RIGHT, f"{RECIPE_FILE}, {config.merge_method}")
    except RecipeError as error:
        verdict = WRONG if os.path.exists(os.path.join(folder, RECIPE_FILE)) else UNCHECKED
        yield in_a_line("recipe", verdict, f"{error.message}; without it no tensor can be computed")
    if config is None or config.merge_method == recipe.METHOD_NAME:
        try:
            masks = MaskSet.open(machine.machine_setting("work_dir") or folder)
            yield _intact(masks)
        except RecipeError as error:
            yield in_a_line("artifact", WRONG, error.message)
    if config is None:
        return
    LoaderCache().setup(options=options)
    if masks:
        yield _models(config, masks)
    elif config.merge_method == recipe.METHOD_NAME:
        yield Check("tensors", UNCHECKED, "there is no mask to compute them with")
        return
    yield from tensor_checks(folder, config, masks, options, sample)


def _intact(masks: MaskSet) -> Check:
    problems = masks.problems()
    if problems:
        return in_a_line("artifact", WRONG, "; ".join(problems))
    told = f"{len(masks.names())} tensors in {masks.path}"
    if not masks.has_checksums:
        return Check("artifact", UNCHECKED, f"{told}: its format has no checksums")
    return Check("artifact", RIGHT, f"{told}, as their checksums say")


def _models(config: MergeConfiguration, masks: MaskSet) -> Check:
    """Compare the models that the recipe names with those that the mask was learned with."""
    told = masks.provenance.get("models")
    if not isinstance(told, dict) or not told:
        return Check("models", UNCHECKED, "the mask does not tell what it was learned with")
    base = told.get(str(masks.provenance.get("base_model")))
    missing: list[str] = []
    other: list[str] = []
    found: list[str] = []
    for model in sorted(config.referenced_models(), key=str):
        try:
            digest = content_fingerprint(model)
        except Exception as error:  # a missing model comes in many ways
            missing.append(f"{model} is not at hand ({first_line(error)})")
            continue
        known = [base] if model == config.base_model else told.values()
        (found if digest in known else other).append(str(model))
    if other:
        what = f"the mask was learned with other models than {', '.join(other)}"
        if (config.parameters or {}).get("mask"):
            # A recipe may apply a mask to models that it was not learned with.
            return Check("models", UNCHECKED, f"{what}, and is given by the recipe")
        return Check("models", WRONG, what)
    if missing:
        return in_a_line("models", UNCHECKED, "; ".join(missing))
    return Check("models", RIGHT, f"the mask was learned with these: {', '.join(found)}")
