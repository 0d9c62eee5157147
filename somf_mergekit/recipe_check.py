"""Read a recipe and say what is wrong with it, all of it at once, before a model is loaded."""

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.options import MergeOptions
from pydantic import ValidationError

from .contracts import check_versions
from .errors import RecipeError, noted, raise_together
from .fusion_check import count_problem, name_problem
from .fusion_methods import known_fusions
from .machine import device_problem, setting_problems
from .mask_folder import folder_problem
from .model_check import check_models
from .processes import own_device
from .recipe import METHOD_NAME, parameters
from .recipe_blocks import model_blocks, parameter_blocks
from .repairs.catalogue import REPAIRS
from .repairs.check import repair_problems
from .value_check import leaves, nearest, value_problems

WRONG_RECIPE = "This recipe is not right"


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], methods: Collection[str] = (METHOD_NAME,)
) -> MergeConfiguration:
    """Return the recipe in a YAML file, a YAML text, or a mapping.

    Args:
        source: where it is.
        methods: names of the merge methods that it may ask for.

    Raises:
        RecipeError: it can't be read, isn't a recipe of mergekit, asks for another method, or has
            keys that mergekit would drop.
    """
    config, problems = recipe_and_problems(source, methods)
    raise_together(problems, WRONG_RECIPE)
    return config


def recipe_and_problems(
    source: str | os.PathLike[str] | Mapping[str, Any], methods: Collection[str] = (METHOD_NAME,)
) -> tuple[MergeConfiguration, list[str]]:
    """Return a recipe as ``read_recipe`` does, and what mergekit would not read of it as meant.

    Raises:
        RecipeError: it can't be read, isn't a recipe of mergekit, or asks for another method.
    """
    if isinstance(source, MergeConfiguration):
        return source, []
    place = "the recipe"
    content: Any = source
    try:
        if not isinstance(source, Mapping):
            text = os.fspath(source)
            if "\n" not in text:
                place = text
                with open(text, encoding="utf-8") as file:
                    text = file.read()
            content = yaml.safe_load(text)
        if not isinstance(content, Mapping):
            raise RecipeError(f"{place}: a recipe is a mapping of keys, not {content!r:.40}")
        config = MergeConfiguration.model_validate(dict(content))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{place} can't be read: {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise_together(problems, f"{place} is no recipe of mergekit")
        raise
    except RuntimeError as error:
        raise RecipeError(f"{place}: {error}") from error
    if config.merge_method not in methods:
        expected = " or ".join(map(repr, methods))
        raise RecipeError(f"{place}: merge_method is {config.merge_method!r}, expected {expected}")
    return config, text_problems(content)


def check_recipe(
    config: MergeConfiguration, options: MergeOptions, found: Iterable[str] = ()
) -> None:
    """Check what a recipe of one of OWN_METHODS says, and that its models can be opened.

    Args:
        config: the recipe.
        options: mergekit's.
        found: what is known to be wrong already.

    Raises:
        RecipeError: everything that is wrong, together; or mergekit lacks what we need of it.
    """
    check_versions()
    problem = device_problem(own_device(options.device))
    problems = [*found, *setting_problems(), *([problem] if problem else [])]
    problems += OWN_METHODS[config.merge_method](config)
    LoaderCache().setup(options=options)
    check_models(config.referenced_models(), config.base_model, options, problems, WRONG_RECIPE)


def check_writable(folder: str) -> None:
    """Check that files can be made in ``folder``, which need not exist yet.

    Raises:
        RecipeError: they can't.
    """
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecipeError(f"output folder {folder} can't be written: {error.strerror}") from error


def folder_problems(out: str | None, folder: str | None) -> list[str]:
    """Return what keeps a merge and its mask from being written, a sentence each.

    Args:
        out: the folder of the merge.
        folder: the folder of the mask.
    """
    problems: list[str] = []
    for place in dict.fromkeys([out, folder]):
        if place is not None:
            with noted(problems):
                check_writable(place)
    found = folder_problem(folder) if folder else None
    return [*problems, *([found] if found else [])]


def recipe_problems(config: Any) -> list[str]:
    """Return everything that is wrong with a recipe as far as its text tells, a sentence each.

    Args:
        config: a mergekit MergeConfiguration.
    """
    top = dict(config.parameters or {})
    problems = []
    if config.base_model is None:
        problems.append(
            "base_model is missing: somf needs the aligned model that the specialists were "
            "fine-tuned from"
        )
    own = {parameter.name: parameter for parameter in parameters()}
    fusion = top.get("fusion", own["fusion"].default)
    theirs: dict[str, ParameterSpec] = {}
    if isinstance(fusion, str) and fusion in known_fusions():
        theirs = {spec.name: spec for spec in known_fusions()[fusion].spec.parameters}
        problems += _fusion_problems(config, fusion)
    elif isinstance(fusion, str):
        problems.append(
            f"parameters.fusion: {fusion!r} is no method of mergekit that is known"
            f"{nearest(fusion, known_fusions())}; known are {', '.join(sorted(known_fusions()))}"
        )
    for place, settings, per_model in parameter_blocks(config):
        for key, value in settings.items():
            where = f"{place}.{key}"
            if key in own:
                problems += value_problems(own[key], value, where, place == "parameters", per_model)
            elif key in theirs:
                problems += _their_problems(theirs[key], value, where, fusion, per_model)
            elif theirs:
                problems.append(
                    f"{where}: unknown parameter{nearest(key, [*own, *theirs])}; neither somf nor "
                    f"{fusion} has it"
                )
    if "mask" in top and "safety_dataset" in top:
        problems.append(
            "parameters.mask and parameters.safety_dataset are both given: a mask is already "
            "learned, so remove one of them"
        )
    if "mask" not in top and "safety_dataset" not in top:
        problems.append(
            "parameters.safety_dataset is missing: name preference pairs to learn the mask on, or "
            "a learned mask with parameters.mask"
        )
    return problems


def text_problems(source: str | Mapping[str, Any]) -> list[str]:
    """Return the top-level keys of a recipe that mergekit would drop without a word."""
    content = yaml.safe_load(source) if isinstance(source, str) else source
    known = [*MergeConfiguration.model_fields, "name"]
    return [
        f"{key}: unknown key{nearest(str(key), known)}" for key in content or {} if key not in known
    ]


def _fusion_problems(config: Any, fusion: str) -> Iterator[str]:
    named = name_problem(fusion)
    if named:
        yield f"parameters.fusion: {named}"
    counts = [
        (place, len({item.model for item in items if item.model != base}))
        for place, items, base in model_blocks(config)
    ]
    if not any(fine_tuned for _, fine_tuned in counts):
        yield "models: somf needs at least one fine-tuned model beside base_model"
    for place, fine_tuned in counts:
        counted = count_problem(fusion, fine_tuned) if fine_tuned else None
        if counted:
            yield f"{place}: {counted}"


def _their_problems(
    spec: ParameterSpec, value: Any, where: str, fusion: str, per_model: bool
) -> Iterator[str]:
    if per_model and spec.scope is ParameterScope.SHARED:
        yield f"{where}: {fusion} takes one for all models; move it out of the model"
        return
    for leaf in leaves(value):
        try:
            spec.validate(leaf)
        except (ValidationError, ValueError):
            kind = getattr(spec.value_type, "__name__", str(spec.value_type))
            yield f"{where}: {leaf!r} is not what {fusion} takes ({kind})"


# What says what is wrong with a recipe of each merge method of this package.
OWN_METHODS = {METHOD_NAME: recipe_problems, **dict.fromkeys(REPAIRS, repair_problems)}
