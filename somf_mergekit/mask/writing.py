"""Writing mask artifacts: learned ones, packed ones, and such as were learned elsewhere."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.errors import RecipeError, first_line
from ..common.files import sync
from .artifact import MaskSet
from .artifact_files import (
    CHECKSUMS_KEY,
    HISTORY_FILE,
    MASKS_FILE,
    PROVENANCE_FILE,
    RECORD_KEYS,
    history_digest,
    record_beside,
)
from .file_content import FileContent, provenance_of
from .format import (
    FORMAT,
    HEADER_KEY,
    encoded_probability,
    json_with_digest,
    packed_bits,
    tensor_digest,
)
from .granularity import Layout


def write_masks(
    folder: str | os.PathLike[str],
    probabilities: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    aliases: Mapping[str, str],
    provenance: Mapping[str, Any],
    history: list[dict[str, Any]],
    layouts: Mapping[str, Layout] | None = None,
    content: FileContent | None = None,
) -> MaskSet:
    """Write an artifact and return it opened.

    The files are made beside ``folder`` and put in place at the end: a folder with this name is
    complete. A mask that is there moves to ``<folder>.before``.

    Args:
        folder: has no other files.
        probabilities: float32 in [0, 1] by the name under which they are stored, the tensor's or
            ``format.stored_name`` where models have masks of their own; as pairs, one is needed at
            a time.
        aliases: further names of stored tensors (tied weights, models with the same mask).
        provenance: JSON-able; stored in ``somf.json`` and in the header of the masks.
        history: one JSON-able row per optimiser step.
        layouts: of those that do not lie on the weight as they are.
        content: what else the file has, and which models.

    Raises:
        RecipeError: it can't be written; nothing is left of the attempt.
    """
    content = content or FileContent()
    pairs = probabilities.items() if isinstance(probabilities, Mapping) else probabilities
    with _new_artifact(folder, provenance) as work:
        for name, value in pairs:
            layout = (layouts or {}).get(name, Layout(tuple(value.shape)))
            content.add(name, encoded_probability(value), layout)
        content.header["aliases"] |= aliases
        _save(work, content, provenance)
        with open(os.path.join(work, HISTORY_FILE), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in history)
    return MaskSet.open(folder)


def write_packed_masks(folder: str | os.PathLike[str], masks: MaskSet) -> MaskSet:
    """Write the binary masks of an artifact with a bit an entry, and return them opened.

    Args:
        folder: must not exist, or be empty.
        masks: learned ones, whose provenance and history are copied.

    Raises:
        RecipeError: these are damaged, or can't be written.
    """
    kept = masks.header.model_dump(include={"aliases", "repeats", "products"})
    content = FileContent(masks.models, header={**kept, "packed": {}})
    for name in masks.stored_names():
        entries = masks.stored_entries(name)
        content.header["packed"][name] = list(entries.shape)
        content.tensors[name] = packed_bits(entries)
    return _written(folder, content, masks.provenance, masks)


def write_split_masks(folder: str | os.PathLike[str], masks: MaskSet) -> dict[str, MaskSet]:
    """Write the masks of each model as an artifact of its own, and return them by model.

    Args:
        folder: must not exist, or be empty; gets a folder for each model, named after it.
        masks: with a mask for each model.

    Raises:
        RecipeError: one mask is of all models, or they are damaged, or can't be written.
    """
    if not masks.models:
        raise RecipeError(f"mask {masks.path} is one mask of all models: there is nothing to split")
    found: dict[str, MaskSet] = {}
    for model, own in masks.each():
        content, record = FileContent(), provenance_of(masks, str(model))
        content.copy(own, None)
        name = os.path.basename(os.path.normpath(str(model)))
        if os.path.exists(os.path.join(folder, name)):
            name = f"{name}-{len(found) + 1}"
        found[str(model)] = _written(os.path.join(folder, name), content, record, masks)
    return found


def write_with_record(
    folder: str | os.PathLike[str], masks: MaskSet, change: Callable[[Any], Any]
) -> MaskSet:
    """Write an artifact with the same masks and history but another record, and return it opened.

    Args:
        folder: must not exist, or be empty.
        masks: those of the artifact.
        change: makes the other record of one, in ``somf.json`` and in the header of the masks, and
            another name of a model's.

    Raises:
        RecipeError: the artifact is damaged, or can't be written.
    """
    kept = masks.header.model_dump(include={"aliases", "repeats", "products", "packed"})
    content = FileContent(change(masks.models), load_file(masks.path), kept)
    record = {k: v for k, v in (record_beside(masks.path) or {}).items() if k not in RECORD_KEYS}
    with _new_artifact(folder, change(record)) as work:
        _save(work, content, change(masks.provenance))
        _copy_history(masks, work)
    return MaskSet.open(folder)


def copy_masks(
    folder: str | os.PathLike[str], masks: MaskSet, provenance: Mapping[str, Any]
) -> MaskSet:
    """Write an artifact with masks that were learned elsewhere, and return it opened.

    The header of the masks still records where they are from.

    Args:
        folder: as of ``write_masks``.
        masks: the learned ones.
        provenance: of their use; JSON-able, stored in ``somf.json``.

    Raises:
        RecipeError: it can't be written; nothing is left of the attempt.
    """
    with _new_artifact(folder, provenance) as work:
        place = os.path.join(work, MASKS_FILE)
        try:
            os.link(os.path.realpath(masks.path), place)
        except OSError:
            shutil.copyfile(masks.path, place)
    return MaskSet.open(folder)


def folder_problem(folder: str) -> str | None:
    """Return a sentence where ``folder`` holds files, and none of them is a mask."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if not found or MASKS_FILE in found:
        return None
    return f"folder {folder} holds files but no mask: name a new or an empty folder"


def without_mask(wanted: str) -> str:
    """Return ``wanted`` after removing a mask that is there; a numbered name if it has others."""
    if os.path.isfile(os.path.join(wanted, MASKS_FILE)) and not os.path.islink(wanted):
        shutil.rmtree(wanted)
    name, number = wanted, 1
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name


def _written(
    folder: str | os.PathLike[str],
    content: FileContent,
    provenance: Mapping[str, Any],
    source: MaskSet,
) -> MaskSet:
    """Write an artifact with the training history of another, and return it opened."""
    with _new_artifact(folder, provenance) as work:
        _save(work, content, provenance)
        _copy_history(source, work)
    return MaskSet.open(folder)


def _copy_history(masks: MaskSet, folder: str) -> None:
    history = os.path.join(os.path.dirname(masks.path), HISTORY_FILE)
    if os.path.exists(history):
        shutil.copyfile(history, os.path.join(folder, HISTORY_FILE))


def _save(folder: str, content: FileContent, provenance: Mapping[str, Any]) -> None:
    digests = {name: tensor_digest(stored) for name, stored in content.tensors.items()}
    header = {**content.header, "provenance": provenance, "format": FORMAT, "digests": digests}
    header["models"] = list(content.models)
    save_file(
        content.tensors,
        os.path.join(folder, MASKS_FILE),
        # One key: safetensors writes several in an order that differs from run to run.
        metadata={HEADER_KEY: json.dumps(json_with_digest(header), sort_keys=True)},
    )


@contextlib.contextmanager
def _new_artifact(folder: str | os.PathLike[str], provenance: Mapping[str, Any]) -> Iterator[str]:
    """Give a folder to fill, which becomes ``folder`` when it is complete, and on the disk.

    Raises:
        RecipeError: it can't be written; nothing is left of the attempt.
    """
    target = os.path.abspath(folder)
    parent = os.path.dirname(target)
    try:
        os.makedirs(parent, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".somf-", dir=parent)
        try:
            os.chmod(work, 0o755)
            yield work
            _complete(work, provenance)
            if os.path.exists(os.path.join(target, MASKS_FILE)):
                os.replace(target, without_mask(f"{target}.before"))
            os.replace(work, target)
            sync(parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"the mask can't be written to {target}: {first_line(error)}. Make room, or name "
            "another place, and give the same command again."
        ) from error


def _complete(work: str, provenance: Mapping[str, Any]) -> None:
    """Write ``somf.json`` beside the masks in ``work``, and put all files on the disk.

    The checkpoints of a learning are removed as soon as its mask is written.
    """
    checksums = {MASKS_FILE: MaskSet(os.path.join(work, MASKS_FILE)).header.digest}
    history = os.path.join(work, HISTORY_FILE)
    if os.path.exists(history):
        checksums[HISTORY_FILE] = history_digest(history)
    content = json_with_digest({**provenance, CHECKSUMS_KEY: checksums})
    with open(os.path.join(work, PROVENANCE_FILE), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
    for name in os.listdir(work):
        sync(os.path.join(work, name))
    sync(work)
