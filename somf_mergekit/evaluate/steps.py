"""What is computed of models, once: everything is stored under a key of what decides it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from ..common.digests import json_digest
from ..common.requirements import versions
from ..data.chat import Message
from .evaluation_settings import EvaluationSettings
from .generation import greedy_batches
from .measured_models import ModelsInMemory, Subject, model_digest
from .store import Store

Prompts = Sequence[list[Message]]
# Of a model to each prompt of a set; None where it never left its thought.
Answers = Sequence[str | None]
# Called with what is done, in words, and how many examples are: none at the beginning of a step.
OnProgress = Callable[[str, int], object]


class Steps:
    """The steps of an evaluation, each a look into the store or a computation that ends there.

    Attributes:
        settings: of the evaluation.
        rendering: how chat templates are rendered, all with the date of the beginning.
    """

    def __init__(self, settings: EvaluationSettings, store: Store, on_progress: OnProgress):
        self.settings = settings
        how = settings.rendering
        self.rendering = replace(how, date=how.date or date.today().isoformat())
        self._store = store
        self._memory = ModelsInMemory(settings)
        self._digests: dict[Subject, str] = {}
        self._on_progress = on_progress

    def content(self, subject: Subject) -> str:
        """Return a digest of a model, read once."""
        if subject not in self._digests:
            self._digests[subject] = model_digest(subject, self.settings)
        return self._digests[subject]

    def answers(self, subject: Subject, name: str, prompts: Prompts) -> Answers:
        """Return the model's greedy answers to the set ``name``, each batch written at once."""
        settings = self.settings
        key = self._key([subject], ["answers", prompts, settings.max_new_tokens])
        known = self._store.answers(key)
        words = f"{subject.name}: answers to {name}"
        self._on_progress(words, len(known))
        if len(known) < len(prompts):
            ((model, tokenizer),) = self._memory.take(subject)
            for batch in greedy_batches(
                model,
                tokenizer,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                done=set(known),
                how=self.rendering,
            ):
                before = len(known)
                self._store.add_answers(key, {"model": subject.name, "set": name}, prompts, batch)
                self._on_progress(words, len(known) - before)
        return [known[number] for number in range(len(prompts))]

    def once(
        self,
        words: str,
        subjects: Sequence[Subject],
        content: Sequence[Any],
        count: int,
        compute: Callable[..., Any],
        is_final: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Return what is stored of models and content, computed now where there is nothing yet.

        Args:
            words: what is done, for the user.
            subjects: the models that it needs in memory.
            content: what else decides it: which computation it is, its data and its own settings.
            count: of the examples, for the progress.
            compute: is given ``on_batch``, see ``likelihood``, and each model with its tokenizer.
            is_final: asked after it; what isn't final is not stored.
        """
        key = self._key(subjects, content)
        self._on_progress(words, 0)
        done = 0

        def on_batch(finished: int) -> None:
            nonlocal done
            done += finished
            self._on_progress(words, finished)

        if key in self._store.values:
            value = self._store.values[key]
        else:
            value = compute(on_batch, *self._memory.take(*subjects))
            if is_final():
                self._store.add_value(key, {"step": words}, value)
        # Examples that went through no model are done too.
        self._on_progress(words, count - done)
        return value

    def _key(self, subjects: Sequence[Subject], content: Sequence[Any]) -> str:
        settings = self.settings
        # In what batches and where it is computed shows in the last digits.
        how = [settings.batch_size, settings.dtype, settings.place.partition(":")[0]]
        how += [versions(), dict(settings.rendering.keywords)]
        return json_digest([list(map(self.content, subjects)), list(content), how])[:32]
