"""What a merge did: its learning, its mask, its task vectors, what was lost and gained."""

from .census import MaskCensus, MaskSummary
from .names import kind_of, layer_of
from .tables import summary_table

__all__ = ["MaskCensus", "MaskSummary", "kind_of", "layer_of", "summary_table"]
