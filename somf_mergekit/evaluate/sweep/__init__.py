"""Several merges side by side: safety against skill, and which of them no other beats."""

from .scoring import pareto_front
from .sweep_table import value_table, write_record
from .sweeping import sweep

__all__ = ["pareto_front", "sweep", "value_table", "write_record"]
