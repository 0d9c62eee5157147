"""A sweep file: named recipes, and what they are tuned and tested on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...common.errors import RecipeError, noted
from ...data.rendering import Rendering
from ...plugin.merge_check import OWN_METHODS
from ...recipe.blocks import parameter_blocks
from ...recipe.schema import nearest
from ...recipe.settings import METHOD_NAME
from ...recipe.validate import read_recipe
from ..evaluation_sets import EvaluationSets, read_sets
from ..evaluation_settings import EvaluationSettings
from ..for_recipe import named_sources
from .variants import (
    MASK,
    MODEL,
    VARIANT,
    Variant,
    products,
    swept_parameters,
    values_text,
    with_values,
    without_measuring,
)

# In recipes and commands: the seed; the model made by the recipe before; the folder to write to.
SEED, MERGED, OUT = "{seed}", "{merged}", "{out}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sources(_Strict):
    """Where the sets of a split are; see ``read_sets``."""

    safety: str | None = None
    harmless: str | None = None
    pairs: str | None = None
    recognition: str | None = None
    skills: dict[str, str] = {}

    def read(self, recipe: MergeConfiguration | None = None) -> tuple[EvaluationSets, list[str]]:
        """Return the sets, and why some can't be read.

        Args:
            recipe: whose own sources serve where there is none here.
        """
        given = (recipe and recipe.parameters) or {}
        skills, problems = list(self.skills.items()), list[str]()
        if not skills:
            skills, problems = named_sources(str(given.get("skill_eval", "")))
        sets, unread = read_sets(
            self.safety or given.get("safety_eval"),
            self.harmless or given.get("harmless_eval"),
            self.pairs or given.get("pairs_eval"),
            skills,
            recognition=self.recognition,
        )
        return sets, [*(f"parameters.skill_eval: {problem}" for problem in problems), *unread]


class Measuring(_Strict):
    """What is said of ``EvaluationSettings``."""

    limit: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    seed: int | None = None
    resamples: int | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def of(self, settings: EvaluationSettings) -> EvaluationSettings:
        """Return settings with what is said here."""
        said = self.model_dump(exclude_none=True, exclude={"chat_template_kwargs"})
        return replace(settings, **said, rendering=Rendering(self.chat_template_kwargs))


class Entry(_Strict):
    """One of ``recipes``: a recipe, recipes merged one after the other, or a model as it is."""

    name: str = Field(min_length=1)
    label: str | None = None
    model: str | None = None
    recipe: dict[str, Any] | str | list[dict[str, Any] | str] | None = None
    command: str | None = None
    over: dict[str, list[Any]] | list[dict[str, Any]] = {}
    seeds: list[int] | None = Field(None, min_length=1)
    test_all: bool = False

    def settings(self) -> list[dict[str, Any]]:
        """Return the values of each setting.

        Raises:
            RecipeError: it isn't said, or said twice, how the model is made.
        """
        if (self.model is None) == (self.recipe is None):
            raise RecipeError("give either `recipe` or `model`")
        if self.model and (self.over or self.command):
            raise RecipeError("a `model` is taken as it is: `over` and `command` need a `recipe`")
        if isinstance(self.over, list):
            return self.over or [{}]
        if not all(self.over.values()):
            raise RecipeError("over: name the values of each parameter")
        return products(self.over)

    def variant(self, values: dict[str, Any], seed: int | None) -> Variant:
        """Return the model of a setting and a seed.

        Raises:
            RecipeError: something is wrong with its recipes or values.
        """
        label = self.label or self.name
        names = {} if seed is None else {SEED: seed}
        if self.model:
            return Variant(self.name, label, MODEL, model=filled(self.model, names), seed=seed)
        given = self.recipe if isinstance(self.recipe, list) else [self.recipe]
        recipes = [any_recipe(filled(_content(recipe), names)) for recipe in given]
        is_somf = recipes[0].merge_method == METHOD_NAME
        if any(recipe.merge_method == METHOD_NAME for recipe in recipes[1:]):
            raise RecipeError("of several recipes only the first can be one of somf")
        if is_somf and seed is not None:
            recipes[0] = with_values(recipes[0], {"seed": seed})
        first = recipes[0]
        command = self.command and filled(self.command, names)
        of_command = {f"{{{k}}}": v for k, v in values.items() if f"{{{k}}}" in (command or "")}
        over = {k: [v] for k, v in values.items() if f"{{{k}}}" not in of_command}
        swept, problems = swept_parameters(over, recipes[-1])
        if problems:
            raise RecipeError("; ".join(problems), problems)
        of_recipe = {one.name: one.values[0] for one in swept}
        recipes[-1] = with_values(recipes[-1], of_recipe)
        learns, mask = None, str((first.parameters or {}).get(MASK, ""))
        if is_somf and not mask:
            deciding = {one.name: one.values[0] for one in swept if one.relearns}
            learns = with_values(first, deciding)
            parts = [self.name, values_text(deciding), *map(str, names.values())]
            mask = "-".join(filter(None, parts))
        read = values | of_recipe
        return Variant(
            entry=self.name,
            label=", ".join(filter(None, [label, values_text(read)])),
            kind=VARIANT,
            values=read,
            recipes=tuple(recipes),
            learns=learns,
            mask=mask,
            command=command and filled(command, of_command),
            seed=seed,
            test_all=self.test_all,
        )


class SweepFile(_Strict):
    """A sweep file, see docs/sweep.md."""

    base_model: str
    measure: Sources
    validation: Sources | None = None
    recipes: list[Entry] = Field(min_length=1)
    seeds: list[int] | None = Field(None, min_length=1)
    tune_seeds: list[int] = []
    reference: str | None = None
    skill_kept: float = Field(0.99, ge=0)
    over_refusals: float = Field(0.05, ge=0)
    measuring: Measuring = Measuring()

    def variants(self) -> tuple[list[Variant], list[str]]:
        """Return the models, and what is wrong with names, seeds and recipes, a sentence each."""
        found, problems = [], list(self._problems())
        for entry in self.recipes:
            with noted(problems, f"{entry.name}: "):
                settings = entry.settings()
                seeds: Sequence[int | None] = entry.seeds or self.seeds or [None]
                found += [entry.variant(values, seed) for seed in seeds for values in settings]
        return found, problems

    def _problems(self) -> Iterator[str]:
        names = [entry.name for entry in self.recipes]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield f"recipes: two are called {name}"
        if self.reference not in (None, *names):
            yield f"reference: no recipe is called {self.reference}"
        for given in (self.tune_seeds, *(entry.seeds or [] for entry in self.recipes)):
            if not set(given) <= set(self.seeds or ()):
                yield f"{given} are not among the sweep's own `seeds`"


def read_file(content: Mapping[str, Any]) -> SweepFile:
    """Return a sweep file's content; top-level keys that begin with ``x-`` are left out.

    Raises:
        RecipeError: it isn't a sweep file; all that is wrong is listed.
    """
    try:
        return SweepFile.model_validate({k: v for k, v in content.items() if k[:2] != "x-"})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError("this sweep file isn't right: " + "; ".join(problems)) from error


def filled(content: Any, names: Mapping[str, Any]) -> Any:
    """Return a recipe, or a text, in which names in braces are replaced by what they stand for."""
    if isinstance(content, Mapping):
        return {key: filled(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [filled(item, names) for item in content]
    if isinstance(content, str):
        for name, value in names.items():
            content = content.replace(name, str(value))
    return content


def any_recipe(content: Any) -> MergeConfiguration:
    """Return a recipe of any merge method, without what it asks to be measured on.

    Raises:
        RecipeError: it isn't one, lacks a parameter, or has one that its method would ignore.
    """
    methods = {method.spec.name: method for method in registry.registered_methods()}
    config = without_measuring(read_recipe(content, methods))
    method = config.merge_method
    if method in OWN_METHODS:
        problems = list(OWN_METHODS[method](config))
    else:
        specs = {spec.name: spec for spec in methods[method].spec.parameters}
        given = [(f"{where}.{key}", key) for where, b, _ in parameter_blocks(config) for key in b]
        problems = [
            f"{where}: unknown parameter{nearest(key, specs)}; {method} doesn't have it"
            for where, key in given
            if key not in specs
        ]
        needed = {spec.name for spec in specs.values() if spec.required} - {k for _, k in given}
        problems += [f"{name} is missing: {method} needs it" for name in sorted(needed)]
    if problems:
        raise RecipeError("; ".join(problems), problems)
    return config


def _content(recipe: Any) -> Any:
    """Return a recipe as a mapping: where a path is given, the one in the file."""
    if isinstance(recipe, Mapping):
        return recipe
    try:
        with open(recipe, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{recipe} can't be read: {error}") from error
