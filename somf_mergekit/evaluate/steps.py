"""What is computed of each model, once: everything is kept under a key of what decides it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from ..common.requirements import installed, versions
from ..data.chat import Message
from ..data.pairs import Pair
from .coherence import answers_coherence
from .distance import divergence, shared_sequences
from .generation import greedy_batches
from .harness import Harness
from .judges import Judge, Verdicts, verdicts
from .likelihood import (
    AnswerScores,
    answer_scores,
    answer_sequences,
    comparable_pairs,
    preference_margins,
)
from .measured_models import ModelsInMemory, Subject, model_digest
from .measuring import EvaluationSettings
from .sets import Skill
from .store import Store, digest

Prompts = Sequence[list[Message]]


class Steps:
    """The steps of an evaluation, each a look into the store or a computation that ends there."""

    def __init__(
        self,
        settings: EvaluationSettings,
        store: Store,
        on_progress: Callable[[str, int], object],
    ):
        """Take the settings, where results are kept, and what is told of the progress.

        ``on_progress`` is called with what is done, in words, and how many examples are, none at
        the beginning of a step.
        """
        self.settings = settings
        self._store = store
        self._memory = ModelsInMemory(settings)
        self._digests: dict[str, str] = {}
        how = settings.rendering
        self._how = replace(how, date=how.date or date.today().isoformat())
        self._on_progress = on_progress

    def content(self, subject: Subject) -> str:
        """Return a digest of a model, read once."""
        place = str(subject.folder)
        if place not in self._digests:
            self._digests[place] = model_digest(subject, self.settings)
        return self._digests[place]

    def answers(self, subject: Subject, name: str, prompts: Prompts) -> list[str | None]:
        """Return the model's greedy answers, each batch written when it is there.

        Of a model that never leaves its thought it is None.
        """
        key = self._key("answers", [subject], prompts, self.settings.max_new_tokens)
        known = self._store.answers(key)
        told = {"model": subject.name, "set": name}
        words = f"{subject.name}: answers to {name}"
        self._on_progress(words, len(known))
        if len(known) < len(prompts):
            model, tokenizer = self._memory.take(subject)[0]
            for batch in greedy_batches(
                model,
                tokenizer,
                prompts,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                done=set(known),
                how=self._how,
            ):
                before = len(known)
                self._store.add_answers(key, told, prompts, batch)
                self._on_progress(words, len(known) - before)
        return [known[number] for number in range(len(prompts))]

    def scores(self, subject: Subject, skill: Skill) -> AnswerScores:
        """Return how likely the skill's right answers are under the model."""

        def compute(on_batch: Callable[[int], object]) -> dict[str, Any]:
            model, tokenizer = self._memory.take(subject)[0]
            sequences = answer_sequences(
                tokenizer, skill.examples, self.settings.max_length, self._how
            )
            found = answer_scores(model, sequences, on_batch=on_batch, **self._batches)
            return vars(found)

        key = self._key("scores", [subject], skill.examples, self.settings.max_length)
        words = f"{subject.name}: likelihood of {skill.name}"
        return AnswerScores(**self._once(key, words, len(skill.examples), compute))

    def margins(self, subject: Subject, pairs: Sequence[Pair]) -> list[float | None]:
        """Return the margin of each pair, None where its answers don't differ for the model."""

        def compute(on_batch: Callable[[int], object]) -> list[float | None]:
            model, tokenizer = self._memory.take(subject)[0]
            found = comparable_pairs(tokenizer, pairs, self.settings.max_length, self._how)
            margins = preference_margins(
                model, list(found.values()), on_batch=on_batch, **self._batches
            )
            by_number = dict(zip(found, margins, strict=True))
            return [by_number.get(number) for number in range(len(pairs))]

        content = [[pair.prompt, pair.chosen, pair.rejected] for pair in pairs]
        key = self._key("margins", [subject], content, self.settings.max_length)
        # Two answers of each go through the model.
        return list(self._once(key, f"{subject.name}: safety pairs", 2 * len(pairs), compute))

    def distance(
        self, subject: Subject, reference: Subject, skill: Skill
    ) -> tuple[list[float], list[int]] | None:
        """Return KL(reference || model) summed over each answer's tokens, and their number.

        None where the two models' tokenizers differ on the examples.
        """

        def compute(on_batch: Callable[[int], object]) -> Any:
            (model, mine), (other, theirs) = self._memory.take(subject, reference)
            sequences = shared_sequences(
                mine, theirs, skill.examples, self.settings.max_length, self._how
            )
            if sequences is None:
                return None
            return divergence(model, other, sequences, on_batch=on_batch, **self._batches)

        key = self._key("distance", [subject, reference], skill.examples, self.settings.max_length)
        words = f"{subject.name}: distance from {reference.name} on {skill.name}"
        found = self._once(key, words, len(skill.examples), compute)
        return found and (found[0], found[1])

    def coherence(
        self, base: Subject, of: str, name: str, prompts: Prompts, answers: list[str | None]
    ) -> dict[str, list[Any]]:
        """Return how the base reads the answers of the model called ``of``."""

        def compute(on_batch: Callable[[int], object]) -> dict[str, Any]:
            model, tokenizer = self._memory.take(base)[0]
            return answers_coherence(
                model,
                tokenizer,
                prompts,
                answers,
                max_length=self.settings.max_length,
                batch_size=self.settings.batch_size,
                on_batch=on_batch,
                how=self._how,
            )

        content = [list(prompts), answers]
        key = self._key("coherence", [base], content, self.settings.max_length)
        words = f"{of}: coherence of answers to {name}"
        return dict(self._once(key, words, len(answers), compute))

    def judged(
        self, judge: Judge, of: str, name: str, prompts: Prompts, answers: list[str | None]
    ) -> Verdicts:
        """Return the judge's verdicts on the answers of the model called ``of``."""

        def compute(on_batch: Callable[[int], object]) -> Verdicts:
            return verdicts(judge, self._memory, prompts, answers, self.settings, on_batch)

        content = [list(prompts), answers, judge.about, judge.labels]
        key = self._key("judge", [judge.subject], content, None)
        words = f"{of}: judging answers to {name}"
        return dict(self._once(key, words, len(answers), compute))

    def harness(self, harness: Harness, subject: Subject) -> dict[str, dict[str, list[Any]]]:
        """Return what lm-evaluation-harness measures of the model."""

        def compute(on_batch: Callable[[int], object]) -> Any:
            self._memory.clear()
            return harness.results(subject, self.settings)

        settings = self.settings
        content = [harness.tasks, harness.content, settings.limit, settings.resamples]
        content.append(installed("lm-eval"))
        key = self._key("harness", [subject], content, None)
        return dict(self._once(key, f"{subject.name}: lm-evaluation-harness", 1, compute))

    @property
    def _batches(self) -> dict[str, int]:
        return {"batch_size": self.settings.batch_size}

    def _key(self, what: str, models: list[Subject], content: Any, size: int | None) -> str:
        settings = self.settings
        # In what batches and where it is computed shows in the last digits.
        how = [settings.batch_size, settings.dtype, settings.place.partition(":")[0]]
        how += [versions(), dict(settings.rendering.keywords)]
        return digest([what, [self.content(model) for model in models], content, size, how])

    def _once(self, key: str, words: str, count: int, compute: Callable[..., Any]) -> Any:
        self._on_progress(words, 0)
        done = 0

        def on_batch(finished: int) -> None:
            nonlocal done
            done += finished
            self._on_progress(words, finished)

        if not self._store.has_value(key):
            self._store.add_value(key, {"step": words}, compute(on_batch))
        # Examples that went through no model are done too.
        self._on_progress(words, count - done)
        return self._store.value(key)
