"""How an evaluation is done: its settings, and what is wrong with them."""

from dataclasses import dataclass, field

import torch

from ..common.machine import device_problem
from ..data.rendering import Rendering

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NamedModel:
    """A model as the user names it: ``source`` is a folder or a hub id, ``name`` its label."""

    name: str
    source: str


@dataclass(frozen=True)
class HarnessSettings:
    """What is handed to lm-evaluation-harness.

    Attributes:
        tasks: names or patterns of its tasks and groups.
        folder: with tasks of one's own, in its YAML format.
    """

    tasks: tuple[str, ...]
    folder: str | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is done.

    Attributes:
        base: whose perplexity and distance are measured; the first model where not given.
        specialists: further models to which the distance is measured.
        judge: a text classifier or a chat guard model that judges answers beside the phrase list,
            or ``garak`` for the phrases of that package.
        judge_label: the classifier's label that says that an answer refuses, where its name does
            not.
        harness: tasks of lm-evaluation-harness, if any.
        limit: the most examples of a set, its first ones; all for None.
        max_new_tokens: of a generated answer.
        max_length: tokens of a prompt with its answer where likelihoods are measured.
        batch_size: sequences that go through a model at once.
        dtype: of the weights; ``auto`` as they are stored.
        device: of torch; a GPU where there is one for None.
        seed, resamples: of the bootstrap.
        trust_remote_code: run the code that comes with a model.
        rendering: how chat templates are rendered; without a date, all of an evaluation is with
            that of its beginning.
    """

    base: NamedModel | None = None
    specialists: tuple[NamedModel, ...] = ()
    judge: str | None = None
    judge_label: str | None = None
    harness: HarnessSettings | None = None
    limit: int | None = None
    max_new_tokens: int = 256
    max_length: int = 512
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    resamples: int = 2000
    trust_remote_code: bool = False
    rendering: Rendering = field(default_factory=Rendering)

    @property
    def place(self) -> str:
        """The device that models are put on."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def text(self) -> str:
        """How it is done, in words."""
        return (
            f"greedy answers of {self.max_new_tokens} tokens at most, likelihoods of "
            f"{self.max_length} with the prompt, batches of {self.batch_size}, dtype {self.dtype}, "
            f"{self.place}"
        )

    def problems(self) -> list[str]:
        """Return what is wrong with the settings themselves, a sentence each."""
        found = []
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"{name} is {value}: expected {least} or more")
        if self.dtype not in DTYPES:
            found.append(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        problem = device_problem(self.place)
        return [*found, problem] if problem else found


_LEAST = {
    "limit": 1,
    "max_new_tokens": 1,
    "max_length": 8,
    "batch_size": 1,
    "seed": 0,
    "resamples": 100,
}
