"""The mask artifact, opened: its entries tensor by tensor.

Nothing in an artifact is ever unpickled, and no name in it becomes a path. Checksums tell damage,
see ``mask_header``; ``mask_folder`` has its files, ``mask_codes`` how entries are stored.
"""

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import RecipeError
from .artifact_folder import (
    MASKS_FILE,
    PROVENANCE_FILE,
    history_problem,
    masks_path,
    told_checksums,
)
from .codes import LEVELS, bit_counts, decoded_probability, level_counts, unpacked_bits
from .granularity import Layout
from .header import HEADER_KEY, checked_header, damaged, header_digest, tensor_digest
from .masking import mask_factor, mask_from_probabilities


class MaskSet:
    """The learned masks of one model, read tensor by tensor from an artifact.

    Names are those of the tensors in the merged checkpoint. Open one with ``MaskSet.open``.
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
                f"mask {path} can't be read: {error}. Get it anew from where it is from, or "
                "move it away and learn the mask again."
            ) from error
        header = checked_header(stored, shapes, types, path)
        self.header: dict[str, Any] = header.model_dump(exclude_unset=True)
        self.provenance = header.provenance
        self._digests = header.digests
        self._aliases = header.aliases
        # Where one entry covers several places of an axis: (axis, how many).
        self._repeats = {name: (axis, many) for name, (axis, many) in header.repeats.items()}
        # Shapes of the masks with a bit an entry.
        self._packed = {name: tuple(shape) for name, shape in header.packed.items()}
        self._shapes = shapes | self._packed
        if os.path.basename(path) == MASKS_FILE:
            self._check_beside()

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "MaskSet":
        """Open an artifact by its folder, by ``masks.safetensors`` in it, or by a merge's folder.

        The header is checked now, the entries of a tensor whenever they are read.

        Raises:
            RecipeError: there is no mask, the file is no mask of a known format, or is damaged.
        """
        return cls(masks_path(os.fspath(source)))

    @property
    def has_checksums(self) -> bool:
        """Whether damage to the entries would be noticed: not in artifacts of the first format."""
        return bool(self._digests)

    def names(self) -> list[str]:
        """Return the names of all tensors that have a mask, sorted."""
        return sorted(set(self._shapes) | set(self._aliases))

    def stored_names(self) -> list[str]:
        """Return the names of the tensors whose masks are stored; others are names for these."""
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes or name in self._aliases

    def layout(self, name: str) -> Layout:
        """Return how the entries of ``name`` lie on its weight, without reading them."""
        stored = self._stored_name(name)
        return self._laid(stored, self._shapes[stored])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in which ``probabilities`` gives the mask of ``name``."""
        return self.layout(name).expanded_shape

    def entries(self, name: str) -> Tensor:
        """Return the probability of each entry, float32, in the shape in which it was learned.

        Raises:
            KeyError: ``name`` has no mask.
            RecipeError: the file is damaged.
        """
        stored = self._stored_name(name)
        codes = self._checked_codes(stored)
        if stored in self._packed:
            return unpacked_bits(codes, self._packed[stored])
        return decoded_probability(codes)

    def histogram(self, name: str) -> Tensor:
        """Return how many entries of ``name`` have each of the probabilities ``levels``, (256,).

        Raises:
            KeyError: ``name`` has no mask.
            RecipeError: the file is damaged.
        """
        stored = self._stored_name(name)
        codes = self._checked_codes(stored)
        if stored in self._packed:
            return bit_counts(codes, self._packed[stored])
        return level_counts(codes)

    def levels(self) -> Tensor:
        """Return the probabilities that entries can have, (256,), float64, ascending."""
        if self._packed:
            return torch.linspace(0, 1, LEVELS, dtype=torch.float64)
        return (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS

    def probabilities(self, name: str) -> Tensor:
        """Return the probabilities, float32, in a shape that broadcasts to the weight.

        Raises:
            KeyError: ``name`` has no mask.
        """
        return self._spread(name, self.entries(name))

    def mask(
        self, name: str, kind: str = "soft", *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return the mask of ``name`` as a merge uses it, float32, as ``probabilities`` is shaped.

        ``temperature`` and ``seed`` matter for the kind ``sampled`` alone.

        Raises:
            KeyError: ``name`` has no mask.
            ValueError: ``kind`` is unknown.
        """
        return self._spread(name, self._drawn(name, kind, temperature, seed))

    def factor(
        self, name: str, kind: str, rescale: str, *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return what a merge multiplies task vectors with, see ``masking.mask_factor``.

        Shape, arguments and errors are those of ``mask``.
        """
        drawn = self._drawn(name, kind, temperature, seed)
        return self._spread(name, mask_factor(drawn, rescale, out=drawn))

    def _drawn(self, name: str, kind: str, temperature: float, seed: int) -> Tensor:
        # Weights that are tied share what is drawn.
        name = self._stored_name(name)
        return mask_from_probabilities(
            self.entries(name), kind, temperature=temperature, seed=seed, name=name
        )

    def problems(self) -> list[str]:
        """Return what is damaged of the artifact, a sentence each, after reading all of it."""
        found = []
        for name in self.stored_names():
            try:
                self._checked_codes(name)
            except RecipeError as error:
                found.append(error.message)
        if os.path.basename(self.path) != MASKS_FILE:
            return found
        folder = os.path.dirname(self.path)
        told = told_checksums(folder)
        if told is None:
            return [*found, f"{os.path.join(folder, PROVENANCE_FILE)} is missing"]
        problem = history_problem(folder, told)
        return [*found, problem] if problem else found

    def _checked_codes(self, stored: str) -> Tensor:
        what = f"mask {self.path}: its tensor {stored}"
        try:
            codes = self._file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise damaged(what, str(error)) from error
        if self._digests and tensor_digest(codes) != self._digests[stored]:
            raise damaged(what, "it has another checksum than when written")
        return codes

    def _check_beside(self) -> None:
        """Compare with the checksum of this file that somf.json has, where that is there."""
        told = told_checksums(os.path.dirname(self.path))
        if told is None:
            return
        wanted = told.get(MASKS_FILE)
        if wanted != header_digest(self.header) and (wanted is not None or self.has_checksums):
            raise RecipeError(
                f"mask {self.path} and the {PROVENANCE_FILE} beside it are not of one artifact: "
                "one of them was replaced. Put back the one that belongs there, or move the folder "
                "away and learn the mask anew."
            )

    def _spread(self, name: str, entries: Tensor) -> Tensor:
        return self._laid(self._stored_name(name), tuple(entries.shape)).expand(entries)

    def _laid(self, stored: str, shape: tuple[int, ...]) -> Layout:
        return Layout(shape, *self._repeats.get(stored, ()))

    def _stored_name(self, name: str) -> str:
        stored = self._aliases.get(name, name)
        if stored not in self._shapes:
            raise KeyError(f"no mask for {name} in {self.path}")
        return stored
