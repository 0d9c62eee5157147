"""What a merge did: its learning, its mask, its task vectors, what was lost and gained."""

from ..mask.census import MaskCensus, MaskSummary, kind_of, layer_of
from .mask_tables import summary_table

__all__ = ["MaskCensus", "MaskSummary", "kind_of", "layer_of", "summary_table"]
