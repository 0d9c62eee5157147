"""What a model refuses, prefers and can still do."""

from .generation import greedy_answers
from .likelihood import answer_loss, preference_accuracy
from .refusals import REFUSAL_PHRASES, is_refusal

__all__ = [
    "REFUSAL_PHRASES",
    "answer_loss",
    "greedy_answers",
    "is_refusal",
    "preference_accuracy",
]
