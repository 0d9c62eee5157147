"""What a model refuses, prefers and can still do."""

from .evaluation import Evaluation
from .evaluation_table import write_evaluation
from .generation import greedy_answers
from .likelihood import answer_loss, preference_accuracy
from .measuring import EvaluationSettings, HarnessSettings, NamedModel
from .refusals import REFUSAL_PHRASES, is_refusal
from .runner import evaluated
from .sets import EvaluationSets, Skill, read_sets

__all__ = [
    "REFUSAL_PHRASES",
    "Evaluation",
    "EvaluationSets",
    "EvaluationSettings",
    "HarnessSettings",
    "NamedModel",
    "Skill",
    "answer_loss",
    "evaluated",
    "greedy_answers",
    "is_refusal",
    "preference_accuracy",
    "read_sets",
    "write_evaluation",
]
