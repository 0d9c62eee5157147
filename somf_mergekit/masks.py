"""The mask artifact: a folder with masks.safetensors, somf.json and training.jsonl.

A probability p is stored in one byte as code = ceil(256 p) - 1 and read as (code + 0.5) / 256: the
error is at most 1/512, and p > 0.5 holds after reading exactly where it held before.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RecipeError
from .masking import mask_from_probabilities

FORMAT = "somf-mask/1"
MASKS_FILE = "masks.safetensors"
PROVENANCE_FILE = "somf.json"
HISTORY_FILE = "training.jsonl"
_LEVELS = 256
_HEADER_KEY = "somf"


def encoded_probability(probability: Tensor) -> Tensor:
    """Return probabilities as uint8 codes in the same shape."""
    codes = torch.ceil(probability.float() * _LEVELS).sub_(1).clamp_(0, _LEVELS - 1)
    return codes.to(torch.uint8)


def decoded_probability(codes: Tensor) -> Tensor:
    """Return uint8 codes as float32 probabilities in the same shape."""
    return codes.float().add_(0.5).div_(_LEVELS)


class MaskSet:
    """The learned masks of one model, read tensor by tensor from an artifact.

    Names are those of the tensors in the merged checkpoint. Open one with ``MaskSet.open``.
    """

    def __init__(self, path: str, provenance: Mapping[str, Any], aliases: Mapping[str, str]):
        self.path = path
        self.provenance: dict[str, Any] = dict(provenance)
        self._aliases = dict(aliases)
        with safe_open(path, framework="pt") as handle:
            self._stored = set(handle.keys())

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "MaskSet":
        """Open an artifact by its folder, by ``masks.safetensors`` in it, or by a merge's folder.

        Raises:
            RecipeError: there is no mask, or the file is no mask of a known format.
        """
        path = masks_path(os.fspath(source))
        try:
            with safe_open(path, framework="pt") as handle:
                stored = (handle.metadata() or {}).get(_HEADER_KEY)
                dtypes = {handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"mask {path} can't be read: {error}") from error
        try:
            header = json.loads(stored) if stored is not None else {}
            known = header.get("format") == FORMAT and dtypes <= {"U8"}
            if known:
                return cls(path, header["provenance"], header["aliases"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"mask {path}: its header is damaged ({error})") from error
        raise RecipeError(
            f"{path} is no mask of format {FORMAT} (found {header.get('format', 'none')}); give "
            "the folder that `mergekit-somf learn` or a somf merge wrote"
        )

    def names(self) -> list[str]:
        """Return the names of all tensors that have a mask, sorted."""
        return sorted(self._stored | set(self._aliases))

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the mask of ``name`` without reading it."""
        with safe_open(self.path, framework="pt") as handle:
            return tuple(handle.get_slice(self._stored_name(name)).get_shape())

    def probabilities(self, name: str) -> Tensor:
        """Return the probability of each entry, float32, in a shape that broadcasts to the weight.

        Raises:
            KeyError: ``name`` has no mask.
        """
        with safe_open(self.path, framework="pt") as handle:
            return decoded_probability(handle.get_tensor(self._stored_name(name)))

    def mask(
        self, name: str, kind: str = "soft", *, temperature: float = 0.5, seed: int = 0
    ) -> Tensor:
        """Return the mask of ``name`` as a merge uses it, float32.

        ``temperature`` and ``seed`` matter for the kind ``sampled`` alone.

        Raises:
            KeyError: ``name`` has no mask.
            ValueError: ``kind`` is unknown.
        """
        return mask_from_probabilities(
            self.probabilities(name), kind, temperature=temperature, seed=seed, name=name
        )

    def _stored_name(self, name: str) -> str:
        stored = self._aliases.get(name, name)
        if stored not in self._stored:
            raise KeyError(f"no mask for {name} in {self.path}")
        return stored


def write_masks(
    folder: str | os.PathLike[str],
    probabilities: Mapping[str, Tensor],
    *,
    aliases: Mapping[str, str],
    provenance: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> MaskSet:
    """Write an artifact and return it opened.

    The files are made beside ``folder`` and put in place at the end: a folder with this name is
    complete.

    Args:
        folder: must not exist, or be empty.
        probabilities: float32 in [0, 1] per tensor name.
        aliases: further names of stored tensors (tied weights).
        provenance: JSON-able; stored in ``somf.json`` and in the header of the masks.
        history: one JSON-able row per optimiser step.
    """
    target = os.path.abspath(folder)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    work = tempfile.mkdtemp(prefix=".somf-", dir=os.path.dirname(target))
    os.chmod(work, 0o755)
    header = {"format": FORMAT, "provenance": provenance, "aliases": dict(aliases)}
    save_file(
        {name: encoded_probability(value) for name, value in probabilities.items()},
        os.path.join(work, MASKS_FILE),
        # One key: safetensors writes several in an order that differs from run to run.
        metadata={_HEADER_KEY: json.dumps(header, sort_keys=True)},
    )
    with open(os.path.join(work, PROVENANCE_FILE), "w", encoding="utf-8") as file:
        json.dump(provenance, file, indent=2, sort_keys=True)
        file.write("\n")
    with open(os.path.join(work, HISTORY_FILE), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in history)
    os.replace(work, target)
    return MaskSet.open(target)


def masks_path(source: str) -> str:
    """Return the masks file that ``source`` (file, artifact or merge folder) means.

    Raises:
        RecipeError: there is none.
    """
    source = os.path.expanduser(source)
    candidates = [
        os.path.join(source, MASKS_FILE),
        os.path.join(source, "somf", MASKS_FILE),
    ]
    if os.path.isfile(source):
        return source
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise RecipeError(
        f"mask {source}: no such mask; expected a file or a folder with {MASKS_FILE}, as "
        "`mergekit-somf learn` and somf merges write"
    )
