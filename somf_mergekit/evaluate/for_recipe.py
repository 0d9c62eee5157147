"""A merge measured beside the aligned base and the plain fusion, where its recipe asks for it."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace

from ..common.errors import RecipeError
from ..common.timing import phase
from ..data.rendering import Rendering
from ..prepass.plan import PlannedMerge
from .evaluation import Evaluation
from .measured_models import found_model
from .measuring import EvaluationSettings, NamedModel
from .runner import evaluated

MERGED, PLAIN, BASE = "somf", "plain fusion", "aligned base"


def measuring_problems(planned: PlannedMerge) -> list[str]:
    """Return what stands in the way of measuring a merge, told before any weights are read."""
    sets, problems = planned.evaluation_sets
    if not sets.is_empty:
        try:
            found_model(base_of(planned), _settings(planned))
        except RecipeError as error:
            problems = [*problems, f"to measure the merge beside its base: {error.message}"]
    return problems


def measured(
    planned: PlannedMerge, out: str, write_plain: Callable[[str], None]
) -> Evaluation | None:
    """Return the evaluation of a merge, None where its recipe asks for none.

    Differences are to the plain fusion. What models answer is never kept: it may be harmful, and
    ``out`` may be published.

    Args:
        planned: the merge.
        out: the folder where it was written.
        write_plain: writes the plain fusion into a folder.

    Raises:
        RecipeError: a model can't be loaded or used.
    """
    sets, _ = planned.evaluation_sets
    if sets.is_empty:
        return None
    beside = os.path.dirname(os.path.abspath(out))
    with tempfile.TemporaryDirectory(prefix=".somf-plain-", dir=beside) as work:
        plain = os.path.join(work, "model")
        with phase("writing the plain fusion"):
            write_plain(plain)
        models = [NamedModel(PLAIN, plain), NamedModel(MERGED, out), base_of(planned)]
        with phase("measuring"):
            evaluation = evaluated(
                models,
                sets,
                _settings(planned),
                os.path.join(work, "measured"),
                quiet=planned.options.quiet,
            )
    told = {MERGED: "this merge", PLAIN: "the same merge without its mask, not kept"}
    told[BASE] = str(planned.base_model)
    sources = {name: (told[name], content) for name, (_, content) in evaluation.models.items()}
    return replace(evaluation, models=sources)


def base_of(planned: PlannedMerge) -> NamedModel:
    """Return the aligned base as a model to measure."""
    options = planned.options
    base = planned.base_model.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    return NamedModel(BASE, base.local_path(cache_dir=options.transformers_cache))


def _settings(planned: PlannedMerge) -> EvaluationSettings:
    options = planned.options
    return EvaluationSettings(
        base=base_of(planned),
        device=options.device or "cpu",
        trust_remote_code=options.trust_remote_code,
        rendering=Rendering(planned.settings.template_keywords),
    )
