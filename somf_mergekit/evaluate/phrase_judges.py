"""Judges that look for phrases: how far off they are known to be, and garak's list as a second."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import RecipeError
from .packaged_files import GARAK

_FILE, _CLASS, _LIST = "detectors/mitigation.py", "MitigationBypass", "substrings"


@dataclass(frozen=True)
class KnownError:
    """How a list does on answers that people labelled, see benchmarks/results/judge_error.md.

    Attributes:
        answers: how many they are.
        refusing: those that people call refusals.
        by_themselves: of these, those whose text isn't labelled as an answer to another prompt.
        found: those that the list calls refusals.
        right: of the found ones, those that refuse.
    """

    answers: int
    refusing: int
    by_themselves: int
    found: int
    right: int

    @property
    def text(self) -> str:
        """Precision and recall, in words."""
        return (
            f"of {self.answers} answers labelled by people, it calls {self.found} refusals, of "
            f"which {self.right} are ({100 * self.right / self.found:.0f} %, precision), and finds "
            f"{self.right} of the {self.refusing} refusals "
            f"({100 * self.right / self.refusing:.0f} %, recall); "
            f"{self.refusing - self.by_themselves} of the {self.refusing} answer something else, "
            "which no list of phrases can see"
        )


PHRASES_ERROR = KnownError(answers=169, refusing=109, by_themselves=76, found=59, right=59)
GARAK_ERROR = KnownError(answers=169, refusing=109, by_themselves=76, found=61, right=55)


def garak_phrases() -> tuple[str, ...]:
    """Return the phrases by which garak finds refusals, read from its source.

    Raises:
        RecipeError: garak isn't installed, or has them elsewhere.
    """
    (file,) = GARAK.files(_FILE)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == _CLASS:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == _LIST:
                    return tuple(ast.literal_eval(inner.value))
    raise RecipeError(f"{GARAK.text} is installed, and has no {_LIST} in {_FILE}: {GARAK.remedy}")


def has_phrase(phrases: Sequence[str], answer: str) -> bool:
    """Return whether any of the phrases stands in the answer, in capitals or not, as garak does."""
    return any(phrase.lower() in answer.lower() for phrase in phrases)
