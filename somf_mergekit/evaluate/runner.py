"""An evaluation from its first check to its result."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..common.console import no_model_bars
from ..common.errors import RecipeError, noted, raise_together
from ..data.rendering import asked
from .evaluation import Evaluation, row_of
from .evaluation_sets import HARMFUL, HARMLESS, PAIRS, RECOGNITION, EvaluationSets
from .evaluation_settings import EvaluationSettings, NamedModel
from .harness import Harness
from .judges import Judge, found_judge
from .measured_models import Subject, found_model, loaded_tokenizer
from .measures import Measures
from .steps import Steps
from .store import Store

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


def evaluated(
    models: Sequence[NamedModel],
    sets: EvaluationSets,
    settings: EvaluationSettings,
    out: str | Path | Store,
    *,
    problems: Sequence[str] = (),
    quiet: bool = False,
    distances: bool = True,
) -> Evaluation:
    """Measure ``models`` on ``sets``; what stands in the folder ``out`` is not computed again.

    One model is in memory at a time, two while a distance is measured.

    Args:
        models: that are compared; differences are to the first.
        sets: what is measured on.
        settings: how.
        out: gets every generated answer (``answers.jsonl``, which may hold harmful text) and what
            was computed (``values.jsonl``); or a store that is open.
        problems: what the caller has found wrong, reported together with what is found here.
        quiet: show no progress bar.
        distances: measure how far the models are from the base and the specialists.

    Raises:
        RecipeError: everything that is wrong, together, before a model is loaded; or a model's
            weights can't be loaded or used.
    """
    folder = out.folder if isinstance(out, Store) else Path(out)
    taking_part = checked_participants(models, sets, settings, folder, problems, distances)
    sets = sets.limited(settings.limit)
    opened = nullcontext(out) if isinstance(out, Store) else Store(folder)
    count = _example_count(taking_part, sets)
    with opened as store, no_model_bars(), _progress(count, quiet) as on_progress:
        steps = Steps(settings, store, on_progress)
        measures = Measures(steps)
        _measure(measures, taking_part, sets)
        harness = taking_part.harness
        by_harness = {
            model.name: measures.by_harness(harness, model)
            for model in taking_part.models
            if harness
        }
    names = [model.name for model in taking_part.models]
    rows = measures.rows(list(sets.sizes), [model.name for model in taking_part.references])
    return Evaluation(
        models={m.name: (m.source, steps.content(m)) for m in taking_part.models},
        base=taking_part.base.name,
        rows=[row_of(row, names, settings.resamples, settings.seed) for row in rows],
        harness=by_harness,
        sets={name: (sets.sources.get(name, ""), size) for name, size in sets.sizes.items()},
        notes=measures.notes,
        settings=settings,
        failures=measures.failures,
    )


def _measure(measures: Measures, taking_part: Participants, sets: EvaluationSets) -> None:
    """Measure all models on all sets, in an order that loads each as seldom as can be."""
    answers = {}
    for model in taking_part.models:
        for name, prompts in sets.asked.items():
            answers[model, name] = measures.answers(model, name, prompts)
        for skill in sets.skills:
            measures.scores(model, skill)
            if skill.extract:
                measures.exact_match(model, skill, answers[model, skill.name])
        if sets.recognition:
            measures.recognised(model, answers[model, RECOGNITION])
        if sets.pairs:
            measures.preferences(model, sets.pairs)
        for reference in taking_part.others(model):
            for skill in sets.skills:
                measures.distance(model, reference, skill)
    for (model, name), found in answers.items():
        measures.coherence(taking_part.base, model, name, sets.asked[name], found)
    for (model, name), found in answers.items():
        if taking_part.judge and name in (HARMFUL, HARMLESS):
            measures.judged(taking_part.judge, model, name, sets.asked[name], found)


def _example_count(taking_part: Participants, sets: EvaluationSets) -> int:
    """Return how many examples all steps together have."""
    asked = sum(map(len, sets.asked.values()))
    judged = len(sets.harmful) + len(sets.harmless) if taking_part.judge else 0
    skills = sum(len(skill.examples) for skill in sets.skills)
    of_each = 2 * asked + judged + 2 * len(sets.pairs) + skills + bool(taking_part.harness)
    distances = sum(len(taking_part.others(model)) for model in taking_part.models)
    return of_each * len(taking_part.models) + distances * skills


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="example", disable=quiet) as bar:

        def on_progress(words: str, count: int) -> None:
            bar.set_description(words, refresh=not count)
            bar.update(count)

        yield on_progress


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
            found += unaskable(subjects[model], sets.limited(settings.limit), settings)
    compared = [subjects[model] for model in models if model in subjects]
    # A reference that is also compared is known by the name that it has there.
    known = {subject.folder.resolve(): subject for subject in reversed(compared)}
    references: dict[Path, Subject] = {}
    for model in asked:
        if model in subjects:
            folder = subjects[model].folder.resolve()
            references.setdefault(folder, known.get(folder, subjects[model]))
    found += _same_names(models, "models")
    found += _same_names(references.values(), "base and specialists")
    judge, harness = None, None
    with noted(found):
        judge = found_judge(settings) if settings.judge else None
    with noted(found):
        harness = Harness(settings.harness) if settings.harness else None
    raise_together(found, IMPOSSIBLE)
    return Participants(compared, list(references.values()), judge, harness, distances)


def unaskable(
    subject: Subject, sets: EvaluationSets, settings: EvaluationSettings
) -> Iterator[str]:
    """Yield what of the sets a model can't be asked, a sentence for each set."""
    tokenizer = loaded_tokenizer(subject.folder, settings)
    pairs = {PAIRS: [pair.messages for pair in sets.pairs]}
    skills = {skill.name: [messages for messages, _ in skill.examples] for skill in sets.skills}
    for name, prompts in {**sets.asked, **skills, **pairs}.items():
        for number, messages in enumerate(prompts):
            try:
                asked(tokenizer, messages, settings.rendering)
            except RecipeError as error:
                yield f"model {subject.source}, prompt {number} of {name}: {error.message}"
                break


def _missing(
    models: Sequence[NamedModel], sets: EvaluationSets, settings: EvaluationSettings
) -> Iterator[str]:
    if not models:
        yield "there is no model to measure"
    if sets.is_empty and not settings.harness:
        yield (
            "there is nothing to measure on: give harmful prompts, harmless prompts, prompts that "
            "look alike, safety pairs or a skill (--safety, --harmless, --recognition, --pairs, "
            "--skill)"
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


def _same_names(models: Iterable[NamedModel | Subject], which: str) -> Iterator[str]:
    for name, count in Counter(model.name for model in models).items():
        if count > 1:
            yield f"{which}: two are called {name}; call one NAME=MODEL"
