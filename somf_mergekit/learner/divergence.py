"""When learning is stopped because it went bad: the rule, and what is known of it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..objectives import PER_TOKEN, PREFERENCES, preference_losses
from ..recipe import Settings

# The loss has exploded when it is so many times what it usually is, so many steps in a row.
TIMES, IN_A_ROW = 5, 5
# A loss is never judged against less than that of a pair whose safe answer has lost so many nats
# to the unsafe one since the reference; some objectives take those of a token.
_LOST, _LOST_A_TOKEN = 10.0, 1.0
# The same for a likelihood, and for the distance from the unmasked merge, in nats a token.
_NATS = math.log(2)


@dataclass(frozen=True)
class Evidence:
    """What is known of a step that went bad.

    Logits all move by about the learning rate, so that the update of a tensor is called as large as
    the norm of its gradient: what the loss asks of it.

    Attributes:
        tensor: with the largest update in ``of_step``, or the one nearest to the model's output
            whose gradient is not finite; None where no update is known.
        of_step: the step with that update, counted from 0.
        share: that tensor's of the squared norm of the whole gradient; None where it is not finite.
        others: further tensors whose gradient is not finite.
        rows: rows of the safety data with their losses, the largest first; those that are not
            finite where some are.
        utility_rows: rows of the utility data whose term is not finite.
    """

    tensor: str | None = None
    of_step: int = 0
    share: float | None = None
    others: int = 0
    rows: Sequence[tuple[int, float]] = ()
    utility_rows: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        squares: Mapping[str, float],
        of_step: int,
        pairs: Sequence[tuple[int, float]],
        utility_rows: Sequence[int],
    ) -> "Evidence":
        """Return what a step says.

        Args:
            squares: of the latest update, the squared norm of the gradient of each tensor, from
                the model's input to its output; empty where there was no update.
            of_step: of that update.
            pairs: rows of the safety data with their losses.
            utility_rows: see Evidence.
        """
        lost = [name for name, square in squares.items() if not math.isfinite(square)]
        tensor, share = (lost[-1] if lost else None), None
        if squares and not lost:
            tensor = max(squares, key=squares.__getitem__)
            share = squares[tensor] / (sum(squares.values()) or 1.0)
        wrong = [(row, loss) for row, loss in pairs if not math.isfinite(loss)]
        return cls(
            tensor=tensor,
            of_step=of_step,
            share=share,
            others=max(0, len(lost) - 1),
            rows=wrong or sorted(pairs, key=lambda pair: -pair[1]),
            utility_rows=utility_rows,
        )


class LearningDiverged(ArithmeticError):
    """Learning went bad.

    Attributes:
        step: the first that did, counted from 0: as many were good.
        what: happened, in words.
        evidence: what is known of it.
        is_intact: whether the logits are those before that step.
    """

    def __init__(self, step: int, what: str, evidence: Evidence, *, is_intact: bool):
        super().__init__(f"{what} at step {step + 1}")
        self.step, self.what, self.evidence, self.is_intact = step, what, evidence, is_intact


@dataclass
class LossWatch:
    """Whether the loss explodes.

    It has when it is TIMES the median of all steps before, IN_A_ROW of them: batches are small and
    the mask is drawn anew for each, so that a single step tells nothing. A median that is next to
    nothing is not judged against, see ``least_judged``.

    Attributes:
        settings: of the recipe.
        losses: of the steps that were good, or not yet judged.
        high: of the latest steps, which are high.
    """

    settings: Settings
    losses: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    _evidence: Evidence = field(default_factory=Evidence)

    @classmethod
    def after(cls, settings: Settings, history: Sequence[Mapping[str, Any]]) -> "LossWatch":
        """Return what has watched steps that are done, by their rows."""
        watch = cls(settings)
        for number, row in enumerate(history):
            watch.see(number, row["loss"], row["utility"], Evidence)
        return watch

    @property
    def is_high(self) -> bool:
        """Whether the latest steps may be the beginning of an explosion."""
        return bool(self.high)

    def see(
        self, step: int, loss: float, utility: float | None, evidence: Callable[[], Evidence]
    ) -> None:
        """Take in what a step showed.

        Args:
            step: its number, from 0.
            loss: the objective's.
            utility: the utility term, without its weight; None where there is none.
            evidence: gives what is known of this step.

        Raises:
            LearningDiverged: the loss has exploded; its ``step`` is the first of those in a row.
        """
        total = loss + self.settings.utility_weight * (utility or 0.0)
        limit = self.limit
        if total <= limit:
            self.losses += [*self.high, total]
            self.high.clear()
            return
        if not self.high:
            self._evidence = evidence()
        self.high.append(total)
        if len(self.high) == IN_A_ROW:
            shown = ", ".join(f"{value:.3g}" for value in self.high)
            raise LearningDiverged(
                step + 1 - IN_A_ROW,
                f"the loss exploded ({IN_A_ROW} steps in a row it was {shown}; {limit:.3g} was to "
                "be expected at most)",
                self._evidence,
                is_intact=False,
            )

    @property
    def limit(self) -> float:
        """The loss from which on a step is high."""
        if not self.losses:
            return math.inf
        return TIMES * max(statistics.median(self.losses), least_judged(self.settings))


def least_judged(settings: Settings) -> float:
    """Return the least loss that steps are judged against, on the objective's own scale.

    A loss may start next to nothing, where many times as much is still little.
    """
    least = _NATS * (settings.utility_weight if settings.utility_dataset else 0.0)
    if settings.objective not in PREFERENCES:
        return least + _NATS
    lost = _LOST_A_TOKEN if settings.objective in PER_TOKEN else _LOST
    losses, _ = preference_losses(settings.objective, torch.tensor([-lost]), settings.beta)
    return least + float(losses) + settings.sft_weight * _NATS
