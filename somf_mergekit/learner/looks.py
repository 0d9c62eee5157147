"""Looks at the mask while it is learned: what they measure, which mask is kept, when it is enough.

The rule is the one-standard-error rule of Breiman, Friedman, Olshen and Stone ("Classification and
Regression Trees", 1984): a mask that was learned longer takes the place of an earlier one only
where it is better by more than what so few pairs leave uncertain. What is compared is bounded, for
margins rise as long as one learns, at the expense of what the merge can do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.encoding import EncodedPair
from ..data.logprobs import pair_batch, pair_length
from .objectives import divergences
from .parts import Content, State
from .training_setup import TrainingSetup, pair_margins

# Of a row of the training history.
LOOK = "look"
# Of DPO per token: the default of ``dpo_norm``.
_BETA = 5.0


@dataclass(frozen=True)
class Look:
    """What the merge under the present mask is like, on pairs that are not learned from.

    Attributes:
        margin: by how many nats a token the safe answers are the likelier ones, on average; None,
            as all others, where something is not finite.
        preference: mean over the pairs of sigmoid(5 h), with h how much larger a pair's margin is
            than under the plain merge: how probable it is, by DPO per token, that its safe answer
            is preferred; 0.5 for the plain merge, and at most 1.
        error: what so few pairs leave uncertain of that: its standard error, at least 1 / pairs.
        divergence: from the plain merge, mean over the tokens; see ``objectives.divergences``.
    """

    margin: float | None
    preference: float | None
    error: float | None
    divergence: float | None


@dataclass(frozen=True)
class Choice:
    """The mask that is kept after some looks.

    Attributes:
        step: after which it was looked at, counted from 1; 0 as long as none is kept.
        waiting: looks since the last gain.
    """

    step: int
    waiting: int


def choice(history: Sequence[Mapping[str, Any]]) -> Choice:
    """Return which mask the looks in a training history keep.

    It stays as long as its preference is within the error of the largest. Then the mask that has
    the largest takes its place: this is what counts as a gain. A mask within the error that
    diverges less than the kept one takes its place too, which doesn't count. In the beginning the
    plain merge stands in the place of the kept mask.

    Args:
        history: a row per step, with a Look as JSON where there was one.
    """
    kept: Mapping[str, Any] = asdict(Look(margin=None, preference=0.5, error=0.0, divergence=0.0))
    best, step, waiting = kept, 0, 0
    for row in history:
        look = row.get(LOOK)
        if look is None:
            continue
        waiting += 1
        if None in look.values():
            continue
        if look["preference"] > best["preference"]:
            best = look
        least = best["preference"] - best["error"]
        is_gain = kept["preference"] < least
        is_as_good = look["preference"] >= least
        if is_gain or (is_as_good and look["divergence"] < kept["divergence"]):
            kept, step = look, row["step"]
        if is_gain:
            waiting = 0
    return Choice(step, waiting)


def has_ended(history: Sequence[Mapping[str, Any]], patience: int | str) -> bool:
    """Return whether a mask is kept, and ``patience`` looks in a row after the last gain were none.

    Args:
        history: a row per step.
        patience: of the recipe.
    """
    kept = choice(history)
    return isinstance(patience, int) and kept.step > 0 and kept.waiting >= patience


def outcome(history: Sequence[Mapping[str, Any]], patience: int | str) -> dict[str, Any]:
    """Return which mask of a training run was taken and why it ended, as JSON; empty without looks.

    Args:
        history: a row per step.
        patience: of the recipe.
    """
    looks = sum(LOOK in row for row in history)
    if not looks:
        return {}
    step, why = choice(history).step, "all steps were taken"
    if has_ended(history, patience):
        why = f"{patience} {'look' if patience == 1 else 'looks in a row'} without a gain"
    elif not step:
        why += ", and no look was a gain over the plain merge"
    return {"looks": looks, "mask_step": step or history[-1]["step"], "why_ended": why}


class Looks:
    """Takes looks, each beside the plain merge, which is measured once.

    The divergence is that on the utility examples, as many as there are validation pairs; without
    them, on the validation pairs' prompts: a mask should not change what a merge predicts of those.
    """

    def __init__(self, setup: TrainingSetup):
        """Measure the plain merge.

        Args:
            setup: with validation pairs.
        """
        self._setup = setup
        texts = setup.utility[: len(setup.validation)]
        if not texts:
            prompts = dict.fromkeys(tuple(pair.prompt) for pair in setup.validation)
            texts = [EncodedPair(list(p[:1]), list(p[1:])) for p in prompts if len(p) > 1]
        self._tokens = sum(len(text.chosen) for text in texts)
        rows = setup.process_group.share(list(range(len(texts))))
        parts = setup.parts(rows, lambda row: pair_length(texts[row]))
        self._texts = [[texts[row] for row in part] for part in parts]
        self._margins = pair_margins(setup, setup.validation, Content.UNMASKED)
        self._unmasked = list(self._log_probs(Content.UNMASKED))

    def look(self) -> Look:
        """Measure the merge under the present mask, as it would be used."""
        margins = pair_margins(self._setup, self._setup.validation, Content.MERGED)
        both = torch.tensor([margins, self._margins], dtype=torch.float64)
        found = torch.sigmoid(_BETA * (both[0] - both[1]))
        log_probs = self._log_probs(Content.MERGED)
        own = [
            float(divergences(found, unmasked).sum())
            for found, unmasked in zip(log_probs, self._unmasked, strict=True)
        ]
        divergence = sum(self._setup.process_group.gathered(own)) / max(1, self._tokens)
        if not all(map(math.isfinite, [*margins, *self._margins, divergence])):
            return Look(None, None, None, None)
        error = max(float(found.std()) / math.sqrt(len(found)), 1 / len(found))
        return Look(float(both[0].mean()), float(found.mean()), error, divergence)

    def _log_probs(self, content: Content) -> Iterator[Tensor]:
        """Yield the log-probabilities of the answers of each of this process' micro-batches."""
        setup = self._setup
        batches = (pair_batch(t, setup.engine.device, is_safe_alone=True) for t in self._texts)
        for found, _ in setup.evaluated(batches, len(self._texts), State(content)):
            yield found
