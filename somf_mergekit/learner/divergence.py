"""What is known where a loss or a gradient is NaN or infinite, which ends learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class LearningDiverged(ArithmeticError):
    """A loss or a gradient isn't finite.

    Nothing else is watched for: a step moves a logit by at most the learning rate.

    Attributes:
        step: at which it was seen, counted from 0.
        rows: of the safety data whose loss isn't finite.
        utility_rows: of the utility data whose term isn't finite.
        tensors: whose gradient isn't finite, from the model's input to its output; empty where a
            loss was seen first, and the logits are those before the step.
    """

    step: int
    rows: Sequence[int] = ()
    utility_rows: Sequence[int] = ()
    tensors: Sequence[str] = ()

    @property
    def what(self) -> str:
        """What happened, in words."""
        return f"{'a gradient' if self.tensors else 'the loss'} became NaN or infinite"

    @property
    def is_intact(self) -> bool:
        """Whether the logits are those before the step."""
        return not self.tensors

    def record(self) -> dict[str, Any]:
        """Return what is stored with the mask as it was before, as JSON; rows count from 0."""
        return {
            "step": self.step + 1,
            "what": self.what,
            "rows": list(self.rows),
            "utility_rows": list(self.utility_rows),
            "tensors": list(self.tensors),
        }
