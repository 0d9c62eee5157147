"""An evaluation from its first check to its result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.console import no_model_bars
from .evaluation import Evaluation, row_of
from .evaluation_checks import Participants, checked_participants
from .judges import Verdicts
from .likelihood import AnswerScores
from .measures import Measures
from .measuring import EvaluationSettings, NamedModel
from .sets import HARMFUL, HARMLESS, PAIRS, EvaluationSets
from .steps import Steps
from .store import Store


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
        problems: what the caller has found wrong, told together with what is found here.
        quiet: show no progress bar.
        distances: measure how far the models are from the base and the specialists.

    Raises:
        RecipeError: everything that is wrong, together, before a model is loaded; or a model's
            weights can't be loaded or used.
    """
    folder = out.folder if isinstance(out, Store) else Path(out)
    taking_part = checked_participants(models, sets, settings, folder, problems)
    taking_part = replace(taking_part, distances=distances)
    sets = sets.limited(settings.limit)
    opened = nullcontext(out) if isinstance(out, Store) else Store(folder)
    count = _example_count(taking_part, sets)
    with opened as store, no_model_bars(), _progress(count, quiet) as on_progress:
        steps = Steps(settings, store, on_progress)
        computed = _computed(steps, taking_part, sets)
        harness = taking_part.harness
        from_harness = {m.name: steps.harness(harness, m) for m in taking_part.models if harness}
    names = [model.name for model in taking_part.models]
    measures, notes = _measures(taking_part, sets, computed)
    used = {HARMFUL: sets.harmful, HARMLESS: sets.harmless, PAIRS: sets.pairs}
    used |= {skill.name: skill.examples for skill in sets.skills}
    return Evaluation(
        models={m.name: (m.source, steps.content(m)) for m in taking_part.models},
        base=taking_part.base.name,
        rows=[
            row_of(measure, names, settings.resamples, settings.seed)
            for measure in measures.rows.values()
        ],
        harness=from_harness,
        sets={n: (sets.told.get(n, ""), len(rows)) for n, rows in used.items() if rows},
        notes=notes,
        settings=settings,
    )


@dataclass
class _Computed:
    """All that was computed of one model, by set, and by reference and skill."""

    answers: dict[str, list[str | None]]
    scores: dict[str, AnswerScores]
    margins: list[float | None]
    distances: dict[tuple[str, str], tuple[list[float], list[int]] | None]
    coherence: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    verdicts: dict[str, Verdicts] = field(default_factory=dict)


def _computed(
    steps: Steps, taking_part: Participants, sets: EvaluationSets
) -> dict[str, _Computed]:
    """Return what is computed of each model, in an order that loads each as seldom as can be."""
    found = {
        model.name: _Computed(
            answers={
                name: steps.answers(model, name, prompts) for name, prompts in sets.asked.items()
            },
            scores={skill.name: steps.scores(model, skill) for skill in sets.skills},
            margins=steps.margins(model, sets.pairs) if sets.pairs else [],
            distances={
                (reference.name, skill.name): steps.distance(model, reference, skill)
                for reference in taking_part.others(model)
                for skill in sets.skills
            },
        )
        for model in taking_part.models
    }
    base, judge = taking_part.base, taking_part.judge
    for model, computed in found.items():
        for name, prompts in sets.asked.items():
            computed.coherence[name] = steps.coherence(
                base, model, name, prompts, computed.answers[name]
            )
    if judge:
        for model, computed in found.items():
            for name, prompts in _judged(sets).items():
                computed.verdicts[name] = steps.judged(
                    judge, model, name, prompts, computed.answers[name]
                )
    return found


def _measures(
    taking_part: Participants, sets: EvaluationSets, computed: dict[str, _Computed]
) -> tuple[Measures, list[str]]:
    """Return the measures in the table's order, and what could not be measured."""
    measures, notes = Measures(), []
    judge = taking_part.judge.subject.name if taking_part.judge else ""
    base = taking_part.base.name

    def coherence(name: str) -> None:
        for model, of in computed.items():
            if name in of.answers:
                measures.add_coherence(name, model, of.answers[name], base, of.coherence[name])

    for name in sets.asked:
        if any(None in of.answers[name] for of in computed.values()):
            for model, of in computed.items():
                measures.add_unfinished(name, model, of.answers[name])
    for name in _judged(sets):
        for model, of in computed.items():
            measures.add_refusals(name, model, of.answers[name], judge, of.verdicts.get(name))
        coherence(name)
    for model, of in computed.items():
        if sets.pairs:
            measures.add_pairs(model, sets.pairs, of.margins)
    for skill in sets.skills:
        for model, of in computed.items():
            measures.add_scores(skill, model, of.scores[skill.name])
            if skill.extract:
                measures.add_exact(skill, model, of.answers[skill.name])
        coherence(skill.name)
        for reference in taking_part.references:
            for model, of in computed.items():
                place = reference.name, skill.name
                if place not in of.distances:
                    continue
                apart = of.distances[place]
                if apart:
                    measures.add_distance(skill, model, reference.name, apart)
                else:
                    notes.append(
                        f"KL from {reference.name} is not measured of {model} on {skill.name}: the "
                        "two models' tokenizers or chat templates give different tokens"
                    )
    for model, of in computed.items():
        equal = sum(margin is None for margin in of.margins)
        if equal:
            notes.append(f"{equal} safety pairs are left out for {model}: cut to equal answers")
    return measures, notes


def _judged(sets: EvaluationSets) -> dict[str, Any]:
    return {name: sets.asked[name] for name in (HARMFUL, HARMLESS) if name in sets.asked}


def _example_count(taking_part: Participants, sets: EvaluationSets) -> int:
    """Return how many examples all steps together have."""
    asked = sum(map(len, sets.asked.values()))
    judged = sum(map(len, _judged(sets).values())) if taking_part.judge else 0
    skills = sum(len(skill.examples) for skill in sets.skills)
    of_each = 2 * asked + judged + 2 * len(sets.pairs) + skills
    of_each += bool(taking_part.harness)
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
