"""Several merges of one learned mask, safety against skill, and which of them none other beats."""

from .undominated import undominated

__all__ = ["undominated"]
