"""A merge measured beside the aligned base and the plain fusion, where its recipe asks for it."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from ..common.errors import RecipeError
from ..common.timing import Timer
from ..data.rendering import Rendering
from ..recipe.settings import Settings
from .evaluation import Evaluation
from .evaluation_sets import (
    HARMFUL,
    HARMLESS,
    PAIRS,
    SOURCE_OPTIONS,
    EvaluationSets,
    read_sets,
)
from .evaluation_settings import EvaluationSettings, NamedModel
from .measured_models import found_model
from .runner import evaluated, unaskable

MERGED, PLAIN, BASE = "somf", "plain fusion", "aligned base"


def sets_of_recipe(settings: Settings) -> tuple[EvaluationSets, list[str]]:
    """Return what a recipe asks to be measured on, and what is wrong with it, a sentence each."""
    skills, problems = named_sources(settings.skill_eval or "")
    of_skills = "parameters.skill_eval: "
    where = {name: of_skills for name, _ in skills}
    where |= {HARMFUL: "parameters.safety_eval: ", HARMLESS: "parameters.harmless_eval: "}
    sets, unread = read_sets(
        settings.safety_eval,
        settings.harmless_eval,
        settings.pairs_eval,
        skills,
        where=where | {PAIRS: "parameters.pairs_eval: "},
    )
    of_names = [of_skills + problem for problem in [*problems, *sets.problems()]]
    return sets, [*unread, *of_names]


def named_sources(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the names and sources in ``math=FILE,code=ID,split=test``, and what is wrong.

    What follows a comma without a name of its own belongs to the source before it.
    """
    found: list[tuple[str, str]] = []
    for part in filter(str.strip, text.split(",")):
        name, equals, source = (piece.strip() for piece in part.partition("="))
        if found and (not equals or name in SOURCE_OPTIONS):
            found[-1] = (found[-1][0], f"{found[-1][1]},{part.strip()}")
        elif name and source:
            found.append((name, source))
        else:
            return [], [f"{part.strip()!r} is not NAME=FILE; several stand with commas between"]
    return found, []


def asks_to_be_measured(settings: Settings) -> bool:
    """Whether a recipe names anything that its merge is to be measured on."""
    named = (settings.safety_eval, settings.harmless_eval, settings.pairs_eval, settings.skill_eval)
    return any(named)


def checked_sets(
    settings: Settings, base_model: ModelReference, options: MergeOptions
) -> tuple[EvaluationSets | None, list[str]]:
    """Return what a merge is to be measured on, and what stands in the way of it, a sentence each.

    No weights are read. There are no sets where the recipe asks for none.

    Args:
        settings: the recipe's own parameters.
        base_model: the aligned base.
        options: mergekit's.
    """
    if not asks_to_be_measured(settings):
        return None, []
    sets, problems = sets_of_recipe(settings)
    if not sets.is_empty:
        try:
            base = base_of(base_model, options)
            measuring = _evaluation_settings(settings, base, options)
            problems = [*problems, *unaskable(found_model(base, measuring), sets, measuring)]
        except RecipeError as error:
            problems = [*problems, f"to measure the merge beside its base: {error.message}"]
    return sets, problems


def measured(
    sets: EvaluationSets | None,
    settings: Settings,
    base_model: ModelReference,
    options: MergeOptions,
    out: str,
    write_plain: Callable[[str], None],
    timer: Timer,
) -> Evaluation | None:
    """Return the evaluation of a merge, None where there is nothing to measure it on.

    Differences are to the plain fusion. What models answer is deleted: it may be harmful, and
    ``out`` may be published.

    Args:
        sets: see ``checked_sets``.
        settings: the recipe's own parameters.
        base_model: the aligned base.
        options: mergekit's.
        out: the folder where the merge was written.
        write_plain: writes the plain fusion into a folder.
        timer: gets the seconds of each phase.

    Raises:
        RecipeError: a model can't be loaded or used.
    """
    if sets is None:
        return None
    base = base_of(base_model, options)
    beside = os.path.dirname(os.path.abspath(out))
    with tempfile.TemporaryDirectory(prefix=".somf-plain-", dir=beside) as work:
        plain = os.path.join(work, "model")
        with timer.phase("writing the plain fusion"):
            write_plain(plain)
        with timer.phase("measuring"):
            evaluation = evaluated(
                [NamedModel(PLAIN, plain), NamedModel(MERGED, out), base],
                sets,
                _evaluation_settings(settings, base, options),
                os.path.join(work, "measured"),
                quiet=options.quiet,
            )
    sources = {
        MERGED: "this merge",
        PLAIN: "the same merge without its mask, deleted",
        BASE: str(base_model),
    }
    models = {name: (sources[name], content) for name, (_, content) in evaluation.models.items()}
    return replace(evaluation, models=models)


def base_of(base_model: ModelReference, options: MergeOptions) -> NamedModel:
    """Return the aligned base as a model to measure, an adapter merged into its own base."""
    base = base_model.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    return NamedModel(BASE, base.local_path(cache_dir=options.transformers_cache))


def _evaluation_settings(
    settings: Settings, base: NamedModel, options: MergeOptions
) -> EvaluationSettings:
    return EvaluationSettings(
        base=base,
        device=options.device or "cpu",
        trust_remote_code=options.trust_remote_code,
        rendering=Rendering(settings.template_keywords),
    )
