"""Rows of a dataset, from the hub, a file or a folder, and a count of those left out."""

import glob
import json
import os
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, overload

from .errors import RecipeError, first_line

FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


_T = TypeVar("_T")


class Examples(Sequence[_T]):
    """Examples of a dataset, each read from its row when it is asked for: none is kept."""

    def __init__(self, rows: Any, numbers: Sequence[int], read: Callable[[int, Any], _T]):
        """Take rows, the numbers of those that give an example, and what reads one of them."""
        self._rows, self._read = rows, read
        self.numbers = array("q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> _T: ...

    @overload
    def __getitem__(self, place: slice) -> "Examples[_T]": ...

    def __getitem__(self, place: int | slice) -> "_T | Examples[_T]":
        if isinstance(place, slice):
            return Examples(self._rows, self.numbers[place], self._read)
        number = self.numbers[place]
        return self._read(number, self._rows[number])

    def sampled(self, count: int | None, seed: int) -> "Examples[_T]":
        """Return ``count`` of them (all for None) in an order drawn from ``seed``."""
        order = array("q", self.numbers)
        random.Random(seed).shuffle(order)
        return Examples(self._rows, order if count is None else order[:count], self._read)


@dataclass
class Dropped:
    """How many rows gave no pair, by reason."""

    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count one dropped row."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    @property
    def why_none(self) -> str:
        """What a sentence ends with that says that no row gave anything."""
        return f": {self}" if self.reasons else ": it has no rows"

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


def examples_of(rows: Any, read: Callable[[int, Any], _T | str]) -> tuple[Examples[_T], Dropped]:
    """Return the examples that rows give, and how many rows were dropped and why.

    Args:
        rows: of a dataset; all are looked at once.
        read: gives the example of a row, whose number comes first, or in words why it has none.
    """
    usable, dropped = [], Dropped()
    for number, row in enumerate(rows):
        found = read(number, row)
        if isinstance(found, str):
            dropped.add(found)
        else:
            usable.append(number)
    return Examples(rows, usable, cast(Callable[[int, Any], _T], read)), dropped


def dataset_rows(source: str, split: str = "train", config: str | None = None) -> Any:
    """Return the rows of a hub dataset, a file (.jsonl, .json, .csv, .parquet) or a folder.

    Raises:
        RecipeError: there is no such file, folder, split or hub dataset, or it can't be read.
    """
    import datasets

    path = os.path.expanduser(source)
    try:
        if os.path.isfile(path):
            extension = os.path.splitext(path)[1].lower()
            if extension not in FILE_FORMATS:
                raise RecipeError(
                    f"dataset file {source}: unknown kind {extension or '(no extension)'}; "
                    f"known are {', '.join(FILE_FORMATS)}"
                )
            # Else a name with brackets would be a pattern, and other files be read.
            name = glob.escape(path)
            kind = FILE_FORMATS[extension]
            return _of_text(datasets.load_dataset(kind, data_files=name, split="train"))
        if os.path.isdir(path):
            if os.path.exists(os.path.join(path, "state.json")):
                _check_inside(source, path, _saved_files(path))
                return _of_text(datasets.load_from_disk(path))
            if glob.escape(os.path.abspath(path)) != os.path.abspath(path):
                raise RecipeError(
                    f"dataset folder {source}: one of *, ? and [ is in its name, which would be "
                    "taken for a pattern; name the folder otherwise"
                )
            return _of_text(_built(source, split, config, path))
        if _looks_like_path(source):
            raise RecipeError(f"dataset {source}: no such file or folder")
        return _of_text(_built(source, split, config))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"dataset {source} (split {split}) can't be read: {first_line(error)}. Expected a hub "
            f"id, a folder, or a file of {', '.join(FILE_FORMATS)}."
        ) from error


def rows_of_prompts(rows: Any, source: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """Yield the named text columns of each row.

    Raises:
        RecipeError: a column is missing, or a value is not text.
    """
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise RecipeError(
            f"dataset {source}: column {', '.join(missing)} missing. "
            f"Found: {', '.join(rows.column_names)}."
        )
    for number, row in enumerate(rows):
        values = tuple(row[column] for column in columns)
        if not all(isinstance(value, str) for value in values):
            raise RecipeError(f"dataset {source}: row {number} has no text in {columns}")
        yield values


def _looks_like_path(source: str) -> bool:
    extension = os.path.splitext(source)[1].lower()
    return extension in FILE_FORMATS or source[:1] in "./~" or source.count("/") > 1


def _built(source: str, split: str, config: str | None, folder: str | None = None) -> Any:
    """Return the rows of a hub dataset, or of the one in a folder; its README.md names the files.

    Raises:
        RecipeError: it names files of this machine that are not its own.
    """
    import datasets

    # Before datasets 4, it would ask on the terminal whether to run code that comes with a
    # dataset, and raise an error from a timer later on where there is none to ask.
    asks = hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE")
    further = {"trust_remote_code": False} if asks else {}
    # What datasets.load_dataset does, with a look in between.
    builder = datasets.load_dataset_builder(folder or source, name=config, **further)
    parts = (builder.config.data_files or {}).values()
    files = [str(file) for part in parts for file in part]
    if folder is None:
        files = [file for file in files if "://" not in file]
    _check_inside(source, folder or str(datasets.config.HF_CACHE_HOME), files)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _saved_files(folder: str) -> list[str]:
    """Return the files that a dataset saved in a folder says it has."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
        return [os.path.join(folder, part["filename"]) for part in json.load(file)["_data_files"]]


def _check_inside(source: str, folder: str, files: Sequence[str]) -> None:
    """Check that the files that a dataset names as its data lie in its folder.

    Raises:
        RecipeError: a file does not.
    """
    # datasets names files where the folder really is, when its name is a link.
    places = [os.path.join(place(folder), "") for place in (os.path.abspath, os.path.realpath)]
    for file in files:
        if not os.path.abspath(file).startswith(tuple(places)):
            raise RecipeError(
                f"dataset {source}: it names {file} as its data, which is not in it; take that out "
                "of its README.md or state.json, or name the file itself"
            )


def _of_text(rows: Any) -> Any:
    """Return rows without the columns that are read by opening what they name, such as images."""
    return rows.remove_columns([name for name, kind in rows.features.items() if _opens(kind)])


def _opens(kind: Any) -> bool:
    if isinstance(kind, dict):
        return any(map(_opens, kind.values()))
    if isinstance(kind, (list, tuple)):
        return any(map(_opens, kind))
    return hasattr(kind, "decode_example") or _opens(getattr(kind, "feature", ()))
