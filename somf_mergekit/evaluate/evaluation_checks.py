"""All that can be wrong with an evaluation, found before a model is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import noted, raise_together
from .evaluation_sets import EvaluationSets
from .evaluation_settings import EvaluationSettings, NamedModel
from .harness import Harness
from .judges import Judge, found_judge
from .measured_models import Subject, found_model

IMPOSSIBLE = "This evaluation can't be made"


@dataclass(frozen=True)
class Participants:
    """The models of an evaluation.

    Attributes:
        models: that are compared.
        references: to which the distance is measured, the base first.
        judge: of the answers, if any.
        harness: lm-evaluation-harness, if it is asked.
        distances: whether the distance to the references is measured.
    """

    models: list[Subject]
    references: list[Subject]
    judge: Judge | None
    harness: Harness | None
    distances: bool

    @property
    def base(self) -> Subject:
        """The model that reads all answers."""
        return self.references[0]

    def others(self, model: Subject) -> list[Subject]:
        """The references to which a model's distance is measured: it has none from itself."""
        own = model.folder.resolve()
        return [r for r in self.references if self.distances and r.folder.resolve() != own]


def checked_participants(
    models: Sequence[NamedModel],
    sets: EvaluationSets,
    settings: EvaluationSettings,
    out: str | Path,
    problems: Sequence[str],
    distances: bool = True,
) -> Participants:
    """Return the models of an evaluation, none of them loaded.

    Raises:
        RecipeError: ``problems`` and all that is wrong with anything else, together.
    """
    # mergekit, which this imports, is slow to come: the demo measures without it.
    from ..prepass.places import check_writable

    found = [*problems, *sets.problems(), *settings.problems()]
    if not problems:
        found += _missing(models, sets, settings)
    if settings.judge_label and not settings.judge:
        found.append("a label is given (--judge-label) but no judge (--judge)")
    with noted(found):
        check_writable(str(out))
    subjects: dict[NamedModel, Subject] = {}
    first = settings.base or next(iter(models), None)
    asked = [model for model in (first, *settings.specialists) if model]
    for model in dict.fromkeys([*models, *asked]):
        with noted(found):
            subjects[model] = found_model(model, settings)
    compared = [subjects[model] for model in models if model in subjects]
    # A reference that is also compared is known by the name that it has there.
    known = {subject.folder.resolve(): subject for subject in reversed(compared)}
    references: dict[Path, Subject] = {}
    for model in asked:
        if model in subjects:
            folder = subjects[model].folder.resolve()
            references.setdefault(folder, known.get(folder, subjects[model]))
    found += _same_names([model.name for model in models], "models")
    found += _same_names([model.name for model in references.values()], "base and specialists")
    judge, harness = None, None
    with noted(found):
        judge = found_judge(settings) if settings.judge else None
    with noted(found):
        harness = Harness(settings.harness) if settings.harness else None
    raise_together(found, IMPOSSIBLE)
    return Participants(compared, list(references.values()), judge, harness, distances)


def _missing(
    models: Sequence[NamedModel], sets: EvaluationSets, settings: EvaluationSettings
) -> Iterator[str]:
    if not models:
        yield "there is no model to measure"
    if sets.is_empty and not settings.harness:
        yield (
            "there is nothing to measure on: give harmful prompts, harmless prompts, safety pairs "
            "or a skill (--safety, --harmless, --pairs, --skill)"
        )
    for skill in sets.skills:
        if not skill.examples:
            yield f"skill {skill.name}: it has no examples"
    if settings.specialists and not sets.skills:
        yield (
            "a specialist is given (--specialist) but no skill (--skill): the distance is measured "
            "on the answers of skills"
        )
    if settings.judge and not (sets.harmful or sets.harmless):
        yield (
            "a judge is given (--judge) but no prompts whose answers it could judge (--safety, "
            "--harmless)"
        )


def _same_names(names: Sequence[str], which: str) -> list[str]:
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    return [f"{which}: two are called {name}; call one NAME=MODEL" for name in twice]
