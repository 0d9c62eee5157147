"""Several merges of one learned mask, safety against skill, and which of them no other beats."""

from .result import Entry, Frontier
from .run import frontier
from .undominated import undominated

__all__ = ["Entry", "Frontier", "frontier", "undominated"]
