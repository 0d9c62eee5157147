"""Read a recipe and say what is wrong with it, all of it at once, before a model is loaded."""

import importlib.resources
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.options import MergeOptions
from pydantic import ValidationError

from ..common.errors import RecipeError, raise_together
from ..common.machine import device_problem
from ..common.process_group import own_device
from ..common.requirements import check_versions
from ..fusion.fusion_methods import known_fusions, takes_base
from .blocks import model_blocks, parameter_blocks
from .fusion_check import count_problem, name_problem
from .mask_check import mask_problems
from .model_check import check_models
from .recipe_keys import key_problems
from .schema import leaves, nearest, value_problems
from .settings import METHOD_NAME, parameters

WRONG_RECIPE = "This recipe is not right"
# The types that mergekit knows and that weights can be merged in.
TYPES = ("bfloat16", "float16", "float32", "float64")


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
    place, file, text = "the recipe", "", ""
    content: Any = source
    try:
        if not isinstance(source, Mapping):
            text = os.fspath(source)
            if "\n" not in text:
                place = file = text
                with open(text, encoding="utf-8") as opened:
                    text = opened.read()
            content = yaml.safe_load(text)
        if not isinstance(content, Mapping):
            raise RecipeError(f"{place}: a recipe is a mapping of keys, not {content!r:.40}")
        config = MergeConfiguration.model_validate(dict(content))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{place} can't be read: {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise_together(problems, f"{place} isn't a recipe of mergekit")
        raise
    except RuntimeError as error:
        hint = "mergekit takes a + for BASE+ADAPTER and an @ for PATH@REVISION, one of each"
        raise RecipeError(f"{place}: {error}; {hint}") from error
    if config.merge_method not in methods:
        expected = " or ".join(map(repr, methods))
        raise RecipeError(f"{place}: merge_method is {config.merge_method!r}, expected {expected}")
    return config, key_problems(text or content, file)


def check_recipe(
    config: MergeConfiguration,
    options: MergeOptions,
    found: Iterable[str] = (),
    awaited: Collection[str] = (),
) -> None:
    """Check what a recipe of whichever method says, and that its models can be opened.

    Args:
        config: the recipe.
        options: mergekit's.
        found: what is known to be wrong already, with its own method's parameters for one.
        awaited: folders of models that will be there by the time of the merge.

    Raises:
        RecipeError: everything that is wrong, together; or mergekit lacks what we need of it.
    """
    check_versions()
    problem = device_problem(own_device(options.device))
    problems = [*found, *([problem] if problem else [])]
    problems += [*type_problems(config, options), *model_problems(config)]
    problems += template_problems(config)
    LoaderCache().setup(options=options)
    there = [model for model in config.referenced_models() if model.model.path not in awaited]
    base = config.base_model if config.base_model in there else None
    if not there:
        raise_together(problems, WRONG_RECIPE)
        return
    check_models(there, base, options, problems, WRONG_RECIPE)


def type_problems(config: MergeConfiguration, options: MergeOptions) -> Iterator[str]:
    """Yield a sentence for each type that mergekit does not know, or that can't be merged in."""
    for place, name in (
        ("dtype", config.dtype),
        ("out_dtype", config.out_dtype),
        ("--lora-merge-dtype", options.lora_merge_dtype),
    ):
        if name is not None and name.removeprefix("torch.") not in TYPES:
            yield (
                f"{place}: {name!r} is not a type to merge in{nearest(name, TYPES)}; write one of "
                f"{', '.join(TYPES)}"
            )


def model_problems(config: MergeConfiguration) -> Iterator[str]:
    """Yield a sentence for each model that is named twice, and each base that is not there."""
    for place, items, base in model_blocks(config):
        if base is None:
            continue
        named = [item.model for item in items]
        if place.endswith("sources") and base not in named:
            yield f"{place}: base_model {base} is not among them: add it, with its layer_range"
        first = same_models([base, *named])
        for number, model in enumerate(named):
            where = f"{place}[{number}].model: {model}"
            if model in named[:number]:
                yield f"{where} is there twice: a model takes part once, with one weight"
            elif first[model] not in (model, base):
                yield f"{where} is {first[model]} by another name: a model takes part once"
            elif first[model] != model:
                yield f"{where} is base_model by another name: name the fine-tuned model"


def template_problems(config: MergeConfiguration) -> list[str]:
    """Return a sentence where the recipe's ``chat_template`` is none that mergekit would write."""
    from mergekit._data import chat_templates
    from mergekit.merge import _set_chat_template

    if config.chat_template == "auto":
        # Looked up among the models, which may be on the hub.
        return []
    try:
        _set_chat_template(SimpleNamespace(), config)
    except RuntimeError:
        files = importlib.resources.files(chat_templates).iterdir()
        names = sorted(f.name.removesuffix(".jinja") for f in files if f.name.endswith(".jinja"))
        return [
            f"chat_template: {config.chat_template!r} isn't a template; expected auto, one of "
            f"{', '.join(names)}, or a Jinja text"
        ]
    return []


def same_models(models: Iterable[ModelReference]) -> Mapping[ModelReference, ModelReference]:
    """Return for each model the first one of which it is another name: itself where it is new."""
    first: dict[tuple[str, ...], ModelReference] = {}
    return {model: first.setdefault(_identity(model), model) for model in models}


def _identity(model: ModelReference) -> tuple[str, ...]:
    parts = [part for part in (model.model, model.lora) if part]
    return tuple(
        os.path.realpath(part.path) if os.path.isdir(part.path) else str(part) for part in parts
    )


def recipe_problems(config: Any) -> list[str]:
    """Return everything that is wrong with the text of a recipe, a sentence each.

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
            f"parameters.fusion: {fusion!r} isn't a method of mergekit that is known"
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
    problems += mask_problems(config)
    return problems


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
    yield from _ignored_bases(config, fusion)
    for place, fine_tuned in counts:
        counted = count_problem(fusion, fine_tuned) if fine_tuned else None
        if counted:
            yield f"{place}: {counted}"


def _ignored_bases(config: Any, fusion: str) -> Iterator[str]:
    """Yield where a recipe gives the base a part in a fusion of the fine-tuned models alone."""
    method = known_fusions()[fusion]
    if takes_base(method):
        return
    for place, items, base in model_blocks(config):
        for number, item in enumerate(items):
            # Slices name the base so that there are task vectors.
            if item.model == base and (item.parameters or not place.endswith("sources")):
                yield (
                    f"{place}[{number}]: {fusion} fuses the masked models alone, and would leave "
                    "out base_model and its weight; for an average with the base use `fusion: "
                    "task_arithmetic`, each model's weight its share in the average"
                )


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
