"""Rows of a dataset, each read when it is asked for, and the examples that they give."""

import glob
import json
import random
from array import array
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from ..common.errors import RecipeError, first_line

_T = TypeVar("_T")


class Unusable(Exception):
    """Why a row gives no example, in words that follow a number of rows."""


class Rows:
    """Rows of a dataset, each read when it is asked for: a value by the name of its column.

    Attributes:
        column_names: of all columns that have text, numbers or lists of them.
        opening: names of the columns that are read by opening what they name, such as images. No
            row has them.
    """

    def __init__(
        self,
        table: Any,
        column_names: Sequence[str],
        opening: Sequence[str] = (),
        read: Callable[[Any], dict[str, Any]] = dict,
    ):
        """Take a sequence, and what makes a row of one of its members."""
        self._table, self._read = table, read
        self.column_names, self.opening = list(column_names), list(opening)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._read(self._table[number])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._read, self._table)


@dataclass
class Dropped:
    """How many rows gave no example, by reason."""

    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, count: int = 1) -> None:
        """Count dropped rows."""
        if count:
            self.reasons[reason] = self.reasons.get(reason, 0) + count

    @property
    def why_none(self) -> str:
        """What a sentence ends with that says that no row gave anything."""
        return f": {self}" if self.reasons else ": it has no rows"

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


class Examples(Sequence[_T]):
    """Examples of a dataset, each read from its row when it is asked for: none is stored.

    Attributes:
        numbers: of the rows that give an example, counted from 0.
        left_out: how many rows of the dataset give none, and why.
        unused: names of the dataset's columns that no example is read from.
    """

    def __init__(
        self,
        rows: Any,
        numbers: Sequence[int],
        read: Callable[[int, Any], _T],
        left_out: Dropped,
        unused: Sequence[str],
    ):
        """Take rows, the numbers of those that give an example, and what reads one of them."""
        self._rows, self._read = rows, read
        self.numbers = array("q", numbers)
        self.left_out, self.unused = left_out, list(unused)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> _T: ...

    @overload
    def __getitem__(self, place: slice) -> "Examples[_T]": ...

    def __getitem__(self, place: int | slice) -> "_T | Examples[_T]":
        if isinstance(place, slice):
            return self._of(self.numbers[place])
        number = self.numbers[place]
        return self._read(number, self._rows[number])

    def sampled(self, count: int | None, seed: int) -> "Examples[_T]":
        """Return ``count`` of them (all for None) in an order drawn from ``seed``."""
        order = array("q", self.numbers)
        random.Random(seed).shuffle(order)
        return self._of(order if count is None else order[:count])

    def notes(self, data: str, dropped: str = "") -> list[str]:
        """Return what isn't used, a sentence each.

        Args:
            data: what the dataset is called, such as "safety dataset".
            dropped: rows that were left out, in words, where more were than gave no example.
        """
        found = []
        if dropped or self.left_out.reasons:
            found.append(f"rows of the {data} left out: {dropped or self.left_out}")
        if self.unused:
            found.append(f"columns of the {data} not used: {', '.join(self.unused)}")
        return found

    def _of(self, numbers: Sequence[int]) -> "Examples[_T]":
        return Examples(self._rows, numbers, self._read, self.left_out, self.unused)


def examples_of(
    rows: Rows,
    read: Callable[[int, dict[str, Any]], _T],
    used: Collection[str],
    key: Callable[[_T], Hashable] | None = None,
) -> Examples[_T]:
    """Return the examples that rows give.

    Args:
        rows: of a dataset; all are looked at once.
        read: gives the example of a row, whose number comes first; raises Unusable where it has
            none.
        used: names of the columns that ``read`` looks at.
        key: of an example; where it is given, one example of each is taken, the first.
    """
    usable, dropped = [], Dropped()
    seen = set()
    for number, row in enumerate(rows):
        try:
            example = read(number, row)
        except Unusable as why:
            dropped.add(str(why))
            continue
        if key and key(example) in seen:
            dropped.add("repeated")
            continue
        if key:
            seen.add(key(example))
        usable.append(number)
    unused = [name for name in (*rows.column_names, *rows.opening) if name not in used]
    return Examples(rows, usable, read, dropped, unused)


def json_table(files: Sequence[str], split: str, source: str, names: dict[str, None]) -> Any:
    """Return a table whose column ``text`` has an object in each row, see ``json_row``.

    Args:
        files: of the split: an object a line, or lists of objects.
        split: its name.
        source: of the dataset, for messages.
        names: gets the objects' keys.

    Raises:
        RecipeError: the text is neither an object a line nor objects or lists of them.
    """
    import datasets

    # Names of files would be taken for patterns.
    known = [file if "://" in file else glob.escape(file) for file in files]
    builder = datasets.load_dataset_builder(
        "text",
        data_files={split: known},
        encoding="utf-8-sig",
        # Else a file without rows is an error without a reason.
        features=datasets.Features({"text": datasets.Value("string")}),
    )
    builder.download_and_prepare()
    table = builder.as_dataset(split)
    numbers, number = array("q"), 0
    try:
        for number, line in enumerate(table):
            if line["text"].strip():
                names.update(dict.fromkeys(_parsed(line["text"])))
                numbers.append(number)
    except (ValueError, RecursionError) as error:
        problem = f"dataset {source} can't be read: line {number + 1}: {first_line(error)}"
        if numbers:
            raise RecipeError(problem) from error
        # One list, or objects of several lines.
        try:
            rows = _objects("\n".join(table["text"]))
        except (ValueError, RecursionError):
            raise RecipeError(problem) from error
        names.update(dict.fromkeys(key for row in rows for key in row))
        return datasets.Dataset.from_dict({"text": [json.dumps(row) for row in rows]})
    return table if len(numbers) == len(table) else table.select(numbers)


def json_row(line: dict[str, str], names: dict[str, None]) -> dict[str, Any]:
    """Return a row of a ``json_table``, with None for each of ``names`` that it lacks."""
    return dict.fromkeys(names) | _parsed(line["text"])


def _parsed(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the objects in a text of objects and lists of them."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found += value if isinstance(value, list) else [value]
        text = text[end:]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("it is not a list of JSON objects")
    return found


def typed_rows(table: Any, wanted: AbstractSet[str] | None, names: Sequence[str] = ()) -> Rows:
    """Return the rows of a table; those of its columns that are read by opening are left out."""
    opening = [name for name, kind in table.features.items() if _opens(kind)]
    known = [name for name in names or table.column_names if name not in opening]
    taken = [
        name
        for name in table.column_names
        if name not in opening and (wanted is None or name in wanted)
    ]
    return Rows(table.select_columns(taken), known, opening)


def _opens(kind: Any) -> bool:
    import pyarrow

    if isinstance(kind, Mapping):
        return any(map(_opens, kind.values()))
    if isinstance(kind, (list, tuple)):
        return any(map(_opens, kind))
    if hasattr(kind, "decode_example"):
        # A path with its bytes is opened; datasets' Json is text that is parsed.
        return pyarrow.types.is_struct(kind())
    return _opens(getattr(kind, "feature", ()))
