"""The mask artifact, opened: its entries tensor by tensor.

An artifact is a folder with masks.safetensors, somf.json, which records where the mask is from and
the checksums of the other files, and training.jsonl, a row a step. Nothing in it is ever unpickled,
and no name in it becomes a path.
"""

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.digests import file_digest, json_digest
from ..common.errors import RecipeError
from .format import (
    DIGEST_KEY,
    HEADER_KEY,
    LEVELS,
    checked_header,
    checked_json,
    damaged,
    decoded_probability,
    tensor_digest,
    unpacked_bits,
)
from .granularity import Layout
from .masking import mask_factor, mask_from_probabilities
from .published import published_folder

MASKS_FILE = "masks.safetensors"
PROVENANCE_FILE = "somf.json"
HISTORY_FILE = "training.jsonl"
CARD_FILE = "README.md"
# In somf.json: the checksums of the other files.
CHECKSUMS_KEY = "checksums"
# What is of the file itself there, not recorded with the mask.
RECORD_KEYS = (CHECKSUMS_KEY, DIGEST_KEY)


class MaskSet:
    """The learned masks of one model, read tensor by tensor from an artifact.

    Names are those of the tensors in the merged checkpoint. Open one with ``MaskSet.open``.

    Attributes:
        path: of the masks file.
        header: of that file.
        provenance: where the masks are from.
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
        self.provenance = self.header.provenance
        self._packed = {name: tuple(shape) for name, shape in self.header.packed.items()}
        self._shapes = shapes | self._packed
        checksums = self._checksums_beside()
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

    def names(self) -> list[str]:
        """Return the names of all tensors that have a mask, sorted."""
        return sorted(set(self._shapes) | set(self.header.aliases))

    def stored_names(self) -> list[str]:
        """Return the names of the tensors whose masks are stored; others are aliases of these."""
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes or name in self.header.aliases

    def layout(self, name: str) -> Layout:
        """Return how the entries of ``name`` lie on its weight, without reading them."""
        stored = self._stored_name(name)
        return Layout(self._shapes[stored], *self.header.repeats.get(stored, ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in which ``probabilities`` gives the mask of ``name``."""
        return self.layout(name).expanded_shape

    def entries(self, name: str) -> Tensor:
        """Return the probability of each entry, float32, in the shape in which it was learned.

        Raises:
            KeyError: ``name`` has no mask.
            RecipeError: the file is damaged.
        """
        codes = self._codes(self._stored_name(name))
        return codes.float() if self._packed else decoded_probability(codes)

    def levels(self) -> Tensor:
        """Return the probabilities that entries can have, (levels,), float64, ascending."""
        if self._packed:
            return torch.tensor([0.0, 1.0], dtype=torch.float64)
        return (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS

    def histogram(self, name: str) -> Tensor:
        """Return how many entries of ``name`` have each probability of ``levels``, (levels,).

        Errors are those of ``entries``.
        """
        codes = self._codes(self._stored_name(name))
        # Counted as the bytes they are: much faster than as floats.
        return torch.bincount(codes.flatten(), minlength=len(self.levels()))

    def probabilities(self, name: str) -> Tensor:
        """Return the probabilities, float32, in a shape that broadcasts to the weight.

        Errors are those of ``entries``.
        """
        return self.layout(name).expand(self.entries(name))

    def mask(
        self, name: str, kind: str = "soft", *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return the mask of ``name`` as a merge uses it, float32, as ``probabilities`` is shaped.

        ``temperature`` matters for the kind ``sampled`` alone, ``seed`` for that and ``bernoulli``.

        Raises:
            KeyError: ``name`` has no mask.
            ValueError: ``kind`` is unknown.
        """
        return self.factor(name, kind, "none", temperature=temperature, seed=seed)

    def factor(
        self, name: str, kind: str, rescale: str, *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return what a merge multiplies task vectors with, see ``masking.mask_factor``.

        Shape, arguments and errors are those of ``mask``.
        """
        # Weights that are tied share what is drawn.
        stored = self._stored_name(name)
        drawn = mask_from_probabilities(
            self.entries(stored), kind, temperature=temperature, seed=seed, name=stored
        )
        return self.layout(stored).expand(mask_factor(drawn, rescale, out=drawn))

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
        checksums = self._checksums_beside()
        if checksums is None:
            found.append(f"{os.path.join(folder, PROVENANCE_FILE)} is missing")
        elif HISTORY_FILE in checksums and not os.path.exists(history):
            found.append(f"{history} is missing")
        elif HISTORY_FILE in checksums and history_digest(history) != checksums[HISTORY_FILE]:
            found.append(f"{history} is damaged: its checksum differs from the one recorded")
        return found

    def _codes(self, stored: str) -> Tensor:
        """Return the stored number of each entry, uint8: a code, or a bit of a packed mask."""
        what = f"mask {self.path}: its tensor {stored}"
        try:
            codes = self._file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise damaged(what, str(error)) from error
        if tensor_digest(codes) != self.header.digests[stored]:
            raise damaged(what, "its checksum differs from the one recorded")
        return unpacked_bits(codes, self._packed[stored]) if self._packed else codes

    def _checksums_beside(self) -> dict[str, Any] | None:
        """Return the checksums that ``somf.json`` records, by file; None where there is none.

        Raises:
            RecipeError: it can't be read, or is damaged.
        """
        record = self.record_beside()
        checksums = (record or {}).get(CHECKSUMS_KEY, {})
        if record is None:
            return None
        return checksums if isinstance(checksums, dict) else {}

    def record_beside(self) -> dict[str, Any] | None:
        """Return all that ``somf.json`` records; None where there is none. Errors: as above."""
        if os.path.basename(self.path) != MASKS_FILE:
            return None
        path = os.path.join(os.path.dirname(self.path), PROVENANCE_FILE)
        what = f"{path}, which records where a mask is from,"
        try:
            with open(path, "rb") as file:
                return checked_json(file.read(), what)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecipeError(f"{what} can't be read: {error}") from error

    def _stored_name(self, name: str) -> str:
        stored = self.header.aliases.get(name, name)
        if stored not in self._shapes:
            raise KeyError(f"no mask for {name} in {self.path}")
        return stored


def masks_path(source: str, cache_dir: str | None = None) -> str:
    """Return the masks file that ``source`` (file, artifact or merge folder) means.

    What isn't there may be the id of a published mask, ORGANISATION/NAME or with @REVISION behind
    it, which is fetched into the hub's cache: ``cache_dir``, or its client's own.

    Raises:
        RecipeError: there is none.
    """
    place = os.path.expanduser(source)
    for inside in ((), (MASKS_FILE,), ("somf", MASKS_FILE)):
        path = os.path.join(place, *inside)
        if os.path.isfile(path):
            return path
    if not os.path.exists(place):
        files = (MASKS_FILE, PROVENANCE_FILE, HISTORY_FILE, CARD_FILE)
        folder = published_folder(source, files, cache_dir)
        if folder:
            return os.path.join(folder, MASKS_FILE)
    raise RecipeError(
        f"mask {source}: no such mask; expected a file or a folder with {MASKS_FILE}, as "
        "`mergekit-somf learn` and somf merges write, or the id of one on the hub"
    )


def training_history(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows that learning wrote into a mask's folder, none where it wrote none."""
    path = os.path.join(folder, HISTORY_FILE)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def history_digest(path: str) -> str:
    """Return the SHA-256 of the recorded steps of learning, without their times.

    A mask that is learned once more, or in two parts, has the same. For a damaged file it is that
    of its bytes.
    """
    try:
        rows = training_history(os.path.dirname(path))
        return json_digest([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    except (ValueError, AttributeError, RecursionError):
        return file_digest(path)
