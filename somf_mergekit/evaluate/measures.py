"""The measures of models: what is computed of each, and the rows of the table that it makes."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ..common.requirements import installed
from ..data.chat import Message
from ..data.pairs import Pair
from .answer_text import N_GRAM, OUTCOMES, extractor, recognitions, refusals, repeated_share
from .evaluation import BY_PHRASES, NUMBER, SHARE, HarnessResults, Measure, Ratio
from .evaluation_sets import HARMFUL, HARMLESS, PAIRS, RECOGNITION, Skill
from .harness import Harness
from .judges import REFUSES, SAFE, Judge, verdicts
from .likelihood import (
    OnBatch,
    Sequences,
    answer_scores,
    answer_sequences,
    comparable_pairs,
    divergence,
    preference_margins,
)
from .measured_models import ModelAndTokenizer, Subject
from .steps import Answers, Prompts, Steps

# Prompts with answers.
Examples = Sequence[tuple[list[Message], str]]
_UNFINISHED = "unfinished thoughts"
# How the rows of a set begin, in the table's order.
_ORDER = (
    _UNFINISHED,
    BY_PHRASES,
    *OUTCOMES,
    "refusals",
    "safe",
    "phrases and",
    "preference",
    "loss",
    "token accuracy",
    "exact match",
    "repeated",
    "empty answers",
    "perplexity",
    "KL from",
)


class Measures:
    """Measures models, one thing of one model a call.

    Attributes:
        notes: what could not be measured, and why.
        failures: what failed, and isn't stored.
    """

    def __init__(self, steps: Steps):
        self.notes: list[str] = []
        self.failures: list[str] = []
        self._steps = steps
        self._rows: dict[tuple[str, str], Measure] = {}

    def rows(self, sets: Sequence[str], references: Sequence[str]) -> list[Measure]:
        """Return all that was measured, in the table's order.

        Args:
            sets: names of the sets, in their order.
            references: names of the models that distances are measured from, in theirs.
        """
        distances = [f"KL from {name}" for name in references]

        def place(row: Measure) -> tuple[int, int, int]:
            kind = next(n for n, start in enumerate(_ORDER) if row.name.startswith(start))
            reference = distances.index(row.name) if row.name in distances else -1
            return sets.index(row.set), kind, reference

        known = [
            row
            for row in self._rows.values()
            if row.name != _UNFINISHED or any(any(of.totals) for of in row.models.values())
        ]
        return sorted(known, key=place)

    def answers(self, model: Subject, name: str, prompts: Prompts) -> Answers:
        """Return the model's answers to a set; measure how many are empty, unfinished, refusals."""
        found = self._steps.answers(model, name, prompts)
        # They neither refuse nor answer.
        self._add((name, _UNFINISHED), model, [answer is None for answer in found])
        empty = [None if answer is None else not answer for answer in found]
        self._add((name, "empty answers"), model, empty)
        if name in (HARMFUL, HARMLESS):
            self._add((name, BY_PHRASES), model, refusals(found))
        return found

    def recognised(self, model: Subject, answers: Answers) -> None:
        """Measure of how many pairs the harmful prompt is refused and its look-alike answered.

        Args:
            model: that answered.
            answers: to a harmful prompt, then to the harmless one that looks like it, and so on.
        """
        for name, found in recognitions(answers).items():
            self._add((RECOGNITION, name), model, found)

    def scores(self, model: Subject, skill: Skill) -> None:
        """Measure loss and token accuracy on right answers."""
        words = f"{model.name}: likelihood of {skill.name}"
        found = self._read(words, model, skill.examples)
        losses = [-value for value in found["log_probs"]]
        self._add((skill.name, "loss"), model, losses, found["tokens"], unit=NUMBER)
        self._add((skill.name, "token accuracy"), model, found["hits"], found["tokens"])

    def exact_match(self, model: Subject, skill: Skill, answers: Answers) -> None:
        """Measure how often what is extracted is right, where it is in the right answer."""
        extracted = extractor(skill.extract or "")
        expected = [extracted(answer) for _, answer in skill.examples]
        match = [
            None if right is None else answer is not None and extracted(answer) == right
            for right, answer in zip(expected, answers, strict=True)
        ]
        self._add((skill.name, f"exact match ({skill.extract})"), model, match)

    def preferences(self, model: Subject, pairs: Sequence[Pair]) -> None:
        """Measure how often, and by how much, the safe answer of a pair is the likelier one."""

        def compute(on_batch: OnBatch, taken: ModelAndTokenizer) -> list[float | None]:
            settings, how = self._steps.settings, self._steps.rendering
            found = comparable_pairs(taken[1], pairs, settings.max_length, how)
            margins = preference_margins(
                taken[0], list(found.values()), batch_size=settings.batch_size, on_batch=on_batch
            )
            by_number = dict(zip(found, margins, strict=True))
            return [by_number.get(number) for number in range(len(pairs))]

        content = ["margins", self._steps.settings.max_length]
        content += [[pair.prompt, pair.chosen, pair.rejected] for pair in pairs]
        words = f"{model.name}: safety pairs"
        # Two answers of each go through the model.
        count = 2 * len(pairs)
        margins = self._steps.once(words, [model], content, count, compute)
        groups = [pair.prompt for pair in pairs]
        right = [None if margin is None else margin > 0 for margin in margins]
        self._add((PAIRS, "preference accuracy"), model, right, groups=groups)
        self._add((PAIRS, "preference margin"), model, margins, unit=NUMBER, groups=groups)
        equal = margins.count(None)
        if equal:
            self.notes.append(
                f"{equal} safety pairs are left out for {model.name}: cut to equal answers"
            )

    def distance(self, model: Subject, reference: Subject, skill: Skill) -> None:
        """Measure the mean KL(reference || model) per token of right answers."""

        def compute(on_batch: OnBatch, one: ModelAndTokenizer, two: ModelAndTokenizer) -> Any:
            sequences = self._sequences(one[1], skill.examples)
            # Models that predict different tokens have no distance.
            if sequences != self._sequences(two[1], skill.examples):
                return None
            size = self._steps.settings.batch_size
            return divergence(one[0], two[0], sequences, batch_size=size, on_batch=on_batch)

        words = f"{model.name}: distance from {reference.name} on {skill.name}"
        content = ["distance", self._steps.settings.max_length, skill.examples]
        count = len(skill.examples)
        found = self._steps.once(words, [model, reference], content, count, compute)
        if found:
            self._add((skill.name, f"KL from {reference.name}"), model, *found, unit=NUMBER)
        else:
            self.notes.append(
                f"KL from {reference.name} is not measured of {model.name} on {skill.name}: the "
                "two models' tokenizers or chat templates give different tokens"
            )

    def coherence(
        self, base: Subject, model: Subject, name: str, prompts: Prompts, answers: Answers
    ) -> None:
        """Measure whether a model's answers are language: gibberish neither refuses nor helps.

        The base reads them in its own tokens, without an end marker: one that ran out of tokens
        has none either.
        """
        words = f"{model.name}: coherence of answers to {name}"
        examples = [(p, answer or "") for p, answer in zip(prompts, answers, strict=True)]
        found = self._read(words, base, examples, closed=False)
        repeated = [
            None if answer is None else share
            for answer, share in zip(answers, found["repeated"], strict=True)
        ]
        self._add((name, f"repeated {N_GRAM}-grams"), model, repeated)
        place = (name, f"perplexity under {base.name}")
        losses = [-value for value in found["log_probs"]]
        self._add(place, model, losses, found["tokens"], unit=NUMBER, exponential=True)

    def judged(
        self, judge: Judge, model: Subject, name: str, prompts: Prompts, answers: Answers
    ) -> None:
        """Measure what the judge says of a model's answers, and how often the phrases disagree."""

        failures: dict[int, str] = {}

        def compute(on_batch: OnBatch, taken: ModelAndTokenizer = (None, None)) -> Any:
            settings = self._steps.settings
            return verdicts(judge, *taken, prompts, answers, settings, on_batch, failures)

        words = f"{model.name}: judging answers to {name}"
        content = ["judge", list(prompts), list(answers), judge.about, judge.labels]
        subjects = [judge.subject] if judge.subject else []
        found = self._steps.once(
            words, subjects, content, len(answers), compute, lambda: not failures
        )
        compared, called = None, judge.name
        for reason in dict.fromkeys(failures.values()):
            which = [number for number, why in failures.items() if why == reason]
            self.failures.append(
                f"judge {called} failed on {len(which)} of {len(answers)} answers of {model.name} "
                f"to {name} (the first is that to prompt {which[0]}), which count for nothing of "
                f"what it says: {reason}"
            )
        # That a helpful answer to a harmless prompt is safe says nothing.
        if name == HARMFUL and found[SAFE].count(None) < len(answers):
            compared = found[SAFE]
            self._add((name, f"safe ({called})"), model, compared)
        if found[REFUSES].count(None) < len(answers):
            compared = found[REFUSES]
            self._add((name, f"refusals ({called})"), model, compared)
        if compared is not None:
            differ = [
                None if verdict is None else verdict != phrase
                for verdict, phrase in zip(compared, refusals(answers), strict=True)
            ]
            self._add((name, f"phrases and {called} disagree"), model, differ)

    def by_harness(self, harness: Harness, model: Subject) -> HarnessResults:
        """Return what lm-evaluation-harness measures of a model."""
        settings = self._steps.settings
        content: list[Any] = ["harness", self._steps.content(model), harness.tasks, harness.content]
        content += [settings.limit, settings.resamples, installed("lm-eval")]
        # It loads the model itself: none may be in memory beside it.
        found: HarnessResults = self._steps.once(
            f"{model.name}: lm-evaluation-harness",
            [],
            content,
            1,
            lambda on_batch: harness.results(model, settings),
        )
        return found

    def _sequences(self, tokenizer: Any, examples: Examples, closed: bool = True) -> Sequences:
        settings, how = self._steps.settings, self._steps.rendering
        return answer_sequences(tokenizer, examples, settings.max_length, how, closed=closed)

    def _read(
        self, words: str, reader: Subject, examples: Examples, closed: bool = True
    ) -> dict[str, Any]:
        """Return the scores of answers under a model, and the share of repeated n-grams in them.

        Returns:
            the fields of ``AnswerScores`` and ``repeated``, an entry per example each.
        """

        def compute(on_batch: OnBatch, taken: ModelAndTokenizer) -> dict[str, Any]:
            model, tokenizer = taken
            sequences = self._sequences(tokenizer, examples, closed)
            size = self._steps.settings.batch_size
            scores = answer_scores(model, sequences, batch_size=size, on_batch=on_batch)
            return {**vars(scores), "repeated": [repeated_share(ids) for _, ids in sequences]}

        content = ["scores", self._steps.settings.max_length, list(examples), closed]
        return dict(self._steps.once(words, [reader], content, len(examples), compute))

    def _add(
        self,
        place: tuple[str, str],
        model: Subject,
        totals: Iterable[float | None],
        weights: Iterable[float] | None = None,
        *,
        unit: str = SHARE,
        exponential: bool = False,
        groups: Sequence[Hashable] = (),
    ) -> None:
        """Add a measure of one model; examples whose total is None say nothing.

        Args:
            place: the set and the name of the measure.
            model: that it is of.
            totals, weights: a numerator and a denominator (1 for None) per example.
            unit, exponential, groups: see ``Measure``; without groups each example is its own.
        """
        values = list(totals)
        given = [1.0] * len(values) if weights is None else list(map(float, weights))
        known = [0.0 if v is None else w for v, w in zip(values, given, strict=True)]
        if place not in self._rows:
            self._rows[place] = Measure(*place, unit, exponential, groups or range(len(values)))
        self._rows[place].models[model.name] = Ratio([float(v or 0) for v in values], known)
