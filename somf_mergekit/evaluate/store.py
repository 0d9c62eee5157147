"""What is known already: answers and measured values, each written as soon as it is known."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..common.files import locked
from ..data.chat import Message

ANSWERS, VALUES = "answers.jsonl", "values.jsonl"


class Store:
    """Two JSON-lines files in a folder, that only grow.

    ``answers.jsonl`` is the only place where prompts and generated answers are written: they may be
    harmful. ``values.jsonl`` holds numbers. A line that an interruption left unfinished is
    ignored. As a context, it holds the folder for this process alone.

    Attributes:
        folder: of the files.
        values: what was computed, by key.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.values: dict[str, Any] = {}
        self._answers: dict[str, dict[int, str | None]] = {}
        self._lock = ExitStack()

    def __enter__(self) -> "Store":
        """Read what is there.

        Raises:
            RecipeError: another process writes there, or it can't be written.
        """
        in_use = f"another process is measuring into {self.folder}: wait for it, or name another"
        try:
            self._lock.enter_context(locked(self.folder, in_use))
        except OSError as error:
            raise RecipeError(f"{self.folder} can't be written: {error.strerror}") from error
        for row in self._rows(ANSWERS):
            self.answers(row["key"])[row["number"]] = row["answer"]
        self.values = {row["key"]: row["value"] for row in self._rows(VALUES)}
        return self

    def __exit__(self, *ended: object) -> None:
        self._lock.close()

    def answers(self, key: str) -> dict[int, str | None]:
        """Return the answers under ``key`` so far, by their prompt's number."""
        return self._answers.setdefault(key, {})

    def add_answers(
        self,
        key: str,
        about: Mapping[str, str],
        prompts: Sequence[Sequence[Message]],
        batch: Mapping[int, str | None],
    ) -> None:
        """Write the answers of a batch.

        Args:
            key: of the set's answers.
            about: what else a reader of the file wants to know of each.
            prompts: the whole set's.
            batch: answers by their prompt's number; those that are there stay as they are.
        """
        known = self.answers(key)
        new = {number: answer for number, answer in batch.items() if number not in known}
        for number, answer in new.items():
            row = {"number": number, "prompt": prompts[number], "answer": answer}
            self._append(ANSWERS, {"key": key, **about, **row})
        known.update(new)

    def add_value(self, key: str, about: Mapping[str, str], value: Any) -> None:
        """Write a value, which JSON can hold."""
        self._append(VALUES, {"key": key, **about, "value": value})
        self.values[key] = value

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with (self.folder / name).open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else "\n" + line
            file.write(line.encode())

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return
        # Not by splitlines, which also parts a line at what an answer may hold.
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield row
