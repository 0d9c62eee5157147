"""Where a merge reads and writes: folders that must not be the same, and the room in them."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from ..common.errors import RecipeError, noted
from ..mask.artifact_files import MASKS_FILE
from ..mask.writing import folder_problem
from ..recipe.adapters import cached_folder

# What is written, into which folder, and its bytes.
File = tuple[str, str, int]
_GIB = 1 << 30


def place_problems(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    out: str | None = None,
    folder: str | None = None,
    cleared: str | None = None,
) -> list[str]:
    """Return what keeps a merge from being written where it is to go, a sentence each.

    Args:
        config: its recipe.
        options: mergekit's.
        out: the folder of the merge.
        folder: the folder of its mask.
        cleared: a folder that is removed on the way.
    """
    problems: list[str] = []
    for place in dict.fromkeys(filter(None, [out, folder])):
        with noted(problems):
            check_writable(place)
    moved = cleared
    if folder:
        in_the_way = folder_problem(folder)
        problems += [in_the_way] if in_the_way else []
        # A mask that is there is put aside, with all that is beside it.
        moved = folder if os.path.exists(os.path.join(folder, MASKS_FILE)) else moved
    for name, place in _inputs(config, options):
        if out:
            problems += _harm(name, place, out)
        if moved and _is_inside(place, moved):
            problems.append(f"{name} is in {moved}, which is put aside or removed: move it")
    return list(dict.fromkeys(problems))


def check_writable(folder: str) -> None:
    """Check that files can be made in ``folder``, which need not exist yet.

    Raises:
        RecipeError: they can't.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise RecipeError(f"output folder {folder} can't be written: {error.strerror}") from error


def check_room(files: Iterable[File]) -> None:
    """Check that there is room for files.

    Args:
        files: what is written; their folders need not exist yet.

    Raises:
        RecipeError: a disk has less room than all that goes there.
    """
    disks: dict[int, list[File]] = {}
    for file in files:
        disks.setdefault(os.stat(_existing(file[1])).st_dev, []).append(file)
    for found in disks.values():
        wanted = sum(size for _, _, size in found)
        free = shutil.disk_usage(_existing(found[0][1])).free
        if wanted > free:
            listed = ", ".join(f"{what} {_gib(n)} in {place}" for what, place, n in found if n)
            raise RecipeError(
                f"there is no room for what this merge writes: {_gib(wanted)} GiB are needed "
                f"({listed}), {_gib(free)} GiB are free. Make room, or name folders on another disk"
            )


def weight_bytes(folder: str) -> int:
    """Return the bytes of the weight files in ``folder``, which a merge into it replaces."""
    ends = (".safetensors", ".bin")
    if not os.path.isdir(folder):
        return 0
    return sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(ends))


def _inputs(config: MergeConfiguration, options: MergeOptions) -> Iterator[tuple[str, str]]:
    """Yield the folders that a merge reads, each with its name for a sentence."""
    for model in sorted(config.referenced_models(), key=str):
        yield f"model {model}", model.model.path
        if model.lora:
            yield f"the adapter {model.lora}", model.lora.path
        if model.lora and options.lora_merge_cache:
            yield f"{model}, put together in --lora-merge-cache,", cached_folder(model, options)


def _harm(name: str, place: str, out: str) -> Iterator[str]:
    """Yield how writing into ``out`` would harm what a merge reads."""
    if os.path.realpath(place) == os.path.realpath(out):
        yield f"output folder {out}: {name} is there, and would be overwritten: name another folder"
    elif os.path.isdir(place) and _is_inside(out, place):
        yield f"output folder {out} is in the folder of {name}: name another folder"
    else:
        shared = _files(place).keys() & _files(out).keys()
        for file in sorted(_files(out)[key] for key in shared):
            yield (
                f"output folder {out}: {file} in it is a file of {name}, linked there, which would "
                "be overwritten: name another folder"
            )


def _files(folder: str) -> dict[tuple[int, int], str]:
    """Return the files in a folder by device and number, whatever links lead to them."""
    if not os.path.isdir(folder):
        return {}
    entries = [entry for entry in os.scandir(folder) if entry.is_file()]
    return {(e.stat().st_dev, e.stat().st_ino): e.name for e in entries}


def _is_inside(place: str, folder: str) -> bool:
    real, outer = os.path.realpath(place), os.path.realpath(folder)
    return os.path.commonpath([real, outer]) == outer


def _existing(folder: str) -> str:
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    return existing


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"
