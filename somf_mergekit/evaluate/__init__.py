"""What a model refuses, prefers and can still do."""

from .answer_text import is_refusal
from .evaluation import Evaluation
from .evaluation_sets import EvaluationSets, Skill, read_sets
from .evaluation_settings import EvaluationSettings, HarnessSettings, NamedModel
from .evaluation_table import write_evaluation
from .generation import greedy_answers
from .likelihood import answer_loss, preference_accuracy
from .runner import evaluated

__all__ = [
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
