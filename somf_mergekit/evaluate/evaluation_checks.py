"""All that can be wrong with an evaluation, found before a model is loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..common.errors import RecipeError, raise_together
from .harness import Harness
from .judges import Judge, found_judge
from .measured_models import Subject, found_model
from .measuring import EvaluationSettings, NamedModel
from .sets import EvaluationSets

IMPOSSIBLE = "This evaluation can't be made"
_T = TypeVar("_T")


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
    distances: bool = True

    @property
    def base(self) -> Subject:
        """The model that reads all answers."""
        return self.references[0]

    def others(self, model: Subject) -> list[Subject]:
        """The references to which a model's distance is measured: it has none from itself."""
        if not self.distances:
            return []
        own = model.folder.resolve()
        return [subject for subject in self.references if subject.folder.resolve() != own]


def checked_participants(
    models: Sequence[NamedModel],
    sets: EvaluationSets,
    settings: EvaluationSettings,
    out: str | Path,
    problems: Sequence[str],
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

    def tried(attempt: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return attempt(*arguments)
        except RecipeError as error:
            found.append(error.message)
            return None

    tried(check_writable, str(out))
    named = dict.fromkeys([*models, *filter(None, [settings.base]), *settings.specialists])
    subjects = {model: tried(found_model, model, settings) for model in named}
    compared = [subject for subject in map(subjects.get, models) if subject]
    # A reference that is also compared is known by the name that it has there.
    known = {subject.folder.resolve(): subject for subject in reversed(compared)}
    references: dict[Path, Subject] = {}
    for model in (settings.base or next(iter(models), None), *settings.specialists):
        subject = model and subjects[model]
        if subject:
            folder = subject.folder.resolve()
            references.setdefault(folder, known.get(folder, subject))
    found += _same_names([model.name for model in models], "models")
    found += _same_names([model.name for model in references.values()], "base and specialists")
    judge = tried(found_judge, settings) if settings.judge else None
    harness = tried(Harness, settings.harness) if settings.harness else None
    raise_together(found, IMPOSSIBLE)
    return Participants(compared, list(references.values()), judge, harness)


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
    return [
        f"{which}: two are called {name}; call one NAME=MODEL"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
