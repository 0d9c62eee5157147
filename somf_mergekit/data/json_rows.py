"""JSON files, in which no column has a type: each row is parsed when it is asked for."""

import glob
import json
from array import array
from collections.abc import Sequence
from typing import Any

from ..common.errors import RecipeError, first_line


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
                names.update(dict.fromkeys(_object(line["text"])))
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
    return dict.fromkeys(names) | _object(line["text"])


def _object(text: str) -> dict[str, Any]:
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
