"""The mask artifact, opened: its entries tensor by tensor.

An artifact is a folder with masks.safetensors, somf.json, which records where the mask is from and
the checksums of the other files, and training.jsonl, a row a step. Nothing in it is ever unpickled,
and no name in it becomes a path.
"""

import copy
import os
from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import RecipeError
from .artifact_files import (
    HISTORY_FILE,
    MASKS_FILE,
    PROVENANCE_FILE,
    checksums_beside,
    history_digest,
    masks_path,
)
from .format import (
    HEADER_KEY,
    LEVELS,
    checked_header,
    damaged,
    decoded_probability,
    stored_name,
    tensor_digest,
    tensor_name,
    unpacked_bits,
)
from .granularity import Layout, product
from .masking import mask_factor, mask_from_probabilities


class MaskSet:
    """Learned masks, read tensor by tensor from an artifact.

    One mask is of all models, or each has its own: then methods that read a mask are those of the
    masks of one, which ``of`` returns. Names are those of the tensors in the merged checkpoint.
    Open one with ``MaskSet.open``.

    Attributes:
        path: of the masks file.
        header: of that file.
        provenance: where the masks are from.
        models: those that have masks of their own; none where one mask is of all.
    """

    def __init__(self, path: str):
        """Open a masks file; see ``open``."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            stored = (self._file.metadata() or {}).get(HEADER_KEY)
            parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            types = {name: part.get_dtype() for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"mask {path} can't be read: {error}. Get it again from where it is from, or "
                "move it away and learn the mask again."
            ) from error
        self.header = checked_header(stored, shapes, types, path)
        self.provenance, self.models = self.header.provenance, tuple(self.header.models)
        self._model: int | None = None  # The number of the model whose masks these are.
        self._packed = {name: tuple(shape) for name, shape in self.header.packed.items()}
        self._shapes = shapes | self._packed
        checksums = checksums_beside(self.path)
        if checksums is not None and checksums.get(MASKS_FILE) != self.header.digest:
            raise RecipeError(
                f"mask {path} and the {PROVENANCE_FILE} beside it are not of one artifact: "
                "one of them was replaced. Put back the one that belongs there, or move the folder "
                "away and learn the mask again."
            )

    @classmethod
    def open(cls, source: str | os.PathLike[str], cache_dir: str | None = None) -> "MaskSet":
        """Open an artifact by its folder, by ``masks.safetensors`` in it, or by a merge's folder.

        It may also be the id of a published one, see ``masks_path``. The header is checked now, the
        entries of a tensor whenever they are read.

        Raises:
            RecipeError: there is no mask, or it is of another format, or damaged.
        """
        return cls(masks_path(os.fspath(source), cache_dir))

    def of(self, model: str | None) -> "MaskSet":
        """Return the masks of one model: these where one mask is of all models.

        Args:
            model: one of ``models``; None for these.

        Raises:
            RecipeError: it has no mask here.
        """
        if model is None or not self.models:
            return self
        if model not in self.models:
            raise RecipeError(
                f"mask {self.path} has masks for {', '.join(self.models)}, none for {model}"
            )
        found = copy.copy(self)
        found._model = self.models.index(model)
        return found

    @property
    def model(self) -> str | None:
        """Whose masks these are, where each model has its own; None for those of all."""
        return None if self._model is None else self.models[self._model]

    def each(self) -> Iterator[tuple[str | None, "MaskSet"]]:
        """Yield each model with its masks; None with these where one mask is of all models."""
        yield from ((model, self.of(model)) for model in self.models or (None,))

    def names(self) -> list[str]:
        """Return the names of all tensors that have a mask, sorted."""
        stored = self._own_names()
        return sorted({tensor_name(name) if self.models else name for name in stored})

    def stored_names(self) -> list[str]:
        """Return the names under which masks are stored in the file, those of all models."""
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        if self.models and self._model is None:
            return any(name in own for _, own in self.each())
        stored = stored_name(str(name), self._model)
        return stored in self._shapes or stored in self.header.aliases

    def layout(self, name: str) -> Layout:
        """Return how the entries of ``name`` lie on its weight, without reading them."""
        return self._layout(self.stored_as(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in which ``probabilities`` gives the mask of ``name``."""
        return self.layout(name).expanded_shape

    def entries(self, name: str) -> Tensor:
        """Return the probability of each entry, float32, as it was learned.

        Raises:
            KeyError: ``name`` has no mask.
            RecipeError: the file is damaged.
        """
        return self.stored_entries(self.stored_as(name))

    def stored_entries(self, stored: str) -> Tensor:
        """Return the probabilities stored under one of ``stored_names``; see ``entries``."""
        codes = self._codes(stored)
        return codes.float() if stored in self._packed else decoded_probability(codes)

    def levels(self) -> Tensor:
        """Return the probabilities that entries can have, (levels,), float64, ascending."""
        aliases = self.header.aliases
        if all(aliases.get(name, name) in self._packed for name in self._own_names()):
            return torch.tensor([0.0, 1.0], dtype=torch.float64)
        return (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS

    def histogram(self, name: str) -> Tensor:
        """Return how many entries of ``name`` have each probability of ``levels``, (levels,).

        Errors are those of ``entries``.
        """
        codes = self._codes(self.stored_as(name))
        # Counted as the bytes they are: much faster than as floats.
        return torch.bincount(codes.flatten(), minlength=len(self.levels()))

    def probabilities(self, name: str, model: str | None = None) -> Tensor:
        """Return the probabilities, float32, in a shape that broadcasts to the weight.

        Of a product of masks, it is that of the probabilities.

        Args:
            name: of the tensor.
            model: whose mask it is, where each model has its own.

        Errors are those of ``entries`` and ``of``.
        """
        own = self.of(model)
        return own.layout(name).expand(own.entries(name))

    def mask(
        self, name: str, kind: str = "soft", *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return the mask of ``name`` as a merge uses it, float32, as ``probabilities`` is shaped.

        ``temperature`` matters for the kind ``sampled`` alone, ``seed`` for that and ``bernoulli``.

        Raises:
            KeyError: ``name`` has no mask.
            ValueError: ``kind`` is unknown.
        """
        return product(self.factors(name, kind, "none", temperature=temperature, seed=seed))

    def factors(
        self, name: str, kind: str, rescale: str, *, temperature: float = 0.5, seed: int = 0
    ) -> tuple[Tensor, ...]:
        """Return what a merge multiplies task vectors with, see ``masking.mask_factor``.

        They are tensors that broadcast to the weight, several where the mask is a product.
        Arguments and errors are those of ``mask``.
        """
        # Weights that are tied share what is drawn; so do models, whose masks may be one.
        stored = self.stored_as(name)
        layout, drawn_as = self._layout(stored), tensor_name(stored) if self.models else stored
        drawn = mask_from_probabilities(
            self.stored_entries(stored), kind, temperature=temperature, seed=seed, name=drawn_as
        )
        return layout.expand_factors(mask_factor(drawn, rescale, layout, out=drawn))

    def problems(self) -> list[str]:
        """Return what is damaged of the artifact, a sentence each, after reading all of it."""
        found = []
        for name in self.stored_names():
            try:
                self._codes(name)
            except RecipeError as error:
                found.append(error.message)
        if os.path.basename(self.path) != MASKS_FILE:
            return found
        folder = os.path.dirname(self.path)
        history = os.path.join(folder, HISTORY_FILE)
        checksums = checksums_beside(self.path)
        if checksums is None:
            found.append(f"{os.path.join(folder, PROVENANCE_FILE)} is missing")
        elif HISTORY_FILE in checksums and not os.path.exists(history):
            found.append(f"{history} is missing")
        elif HISTORY_FILE in checksums and history_digest(history) != checksums[HISTORY_FILE]:
            found.append(f"{history} is damaged: its checksum differs from the one recorded")
        return found

    def _codes(self, stored: str) -> Tensor:
        """Return the stored number of each entry, uint8: a code, or a bit of a packed mask."""
        codes = self.stored(stored)
        return unpacked_bits(codes, self._packed[stored]) if stored in self._packed else codes

    def stored(self, stored: str) -> Tensor:
        """Return what is stored under one of ``stored_names``: codes, or packed bits."""
        what = f"mask {self.path}: its tensor {stored}"
        try:
            codes = self._file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise damaged(what, str(error)) from error
        if tensor_digest(codes) != self.header.digests[stored]:
            raise damaged(what, "its checksum differs from the one recorded")
        return codes

    def _own_names(self) -> set[str]:
        """Return the names under which these masks are stored, those of aliases too."""
        prefix = "" if self._model is None else stored_name("", self._model)
        names = {*self._shapes, *self.header.aliases}
        return {name for name in names if name.startswith(prefix)}

    def _layout(self, stored: str) -> Layout:
        factors = self.header.products.get(stored)
        if factors:
            return Layout.product(*(Layout(tuple(shape)) for shape in factors))
        return Layout(self._shapes[stored], *self.header.repeats.get(stored, ()))

    def stored_as(self, name: str) -> str:
        """Return the name under which the mask of ``name`` is stored in the file.

        Raises:
            KeyError: it has no mask.
            ValueError: each model has masks of its own, and these are not of one.
        """
        if self.models and self._model is None:
            raise ValueError(f"each of {', '.join(self.models)} has its own mask: say of which")
        own = stored_name(name, self._model)
        stored = self.header.aliases.get(own, own)
        if stored not in self._shapes:
            raise KeyError(f"no mask for {name} in {self.path}")
        return stored
