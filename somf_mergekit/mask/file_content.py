"""What goes into a masks file: learned masks, and those of other artifacts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .artifact import MaskSet
from .format import stored_name
from .granularity import Layout


@dataclass
class FileContent:
    """What goes into a masks file.

    Attributes:
        models: those that have masks of their own; none where one mask is of all.
        tensors: by the names under which they are stored: codes, or packed bits.
        header: of each tensor, as in ``format.MaskHeader``.
    """

    models: Sequence[str] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {key: {} for key in ("aliases", "repeats", "products", "packed")}
    )
    _copied: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, name: str, stored: Tensor, layout: Layout) -> None:
        """Add a tensor of a mask with this layout."""
        self.tensors[name] = stored
        if layout.factors:
            self.header["products"][name] = [list(factor.shape) for factor in layout.factors]
        elif layout.repeat > 1:
            self.header["repeats"][name] = [layout.axis, layout.repeat]

    def copy(self, masks: MaskSet, model: int | None) -> None:
        """Add masks of another artifact as those of a model; what is there already gets an alias.

        Args:
            masks: of one model, or one for all.
            model: its number among ``models``; None where they are for all.

        Raises:
            RecipeError: they are damaged.
        """
        for name in masks.names():
            own, known_as = stored_name(name, model), masks.stored_as(name)
            first = self._copied.setdefault((masks.path, known_as), own)
            if first != own:
                self.header["aliases"][own] = first
                continue
            self.add(own, masks.stored(known_as), masks.layout(name))
            if known_as in masks.header.packed:
                self.header["packed"][own] = masks.header.packed[known_as]


def provenance_of(masks: MaskSet, model: str) -> dict[str, Any]:
    """Return the provenance of one model's masks among those of several."""
    record = masks.provenance
    own = (record.get("masks") or {}).get(model)
    if own and model not in record.get("learned", ()):
        # Learned elsewhere, and used here.
        return dict(own["provenance"])
    base, models = str(record.get("base_model")), record.get("models") or {}
    return {**record, "models": {name: models[name] for name in (base, model) if name in models}}
