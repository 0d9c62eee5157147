"""Where a row has a prompt with one answer, and what its labels say of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat import Message
from .conversations import (
    ANSWERS,
    DIALOGUES,
    IS_SAFE,
    LABEL,
    PromptColumns,
    dialogue_column,
    dialogue_of,
    prompt_columns,
    prompt_of,
    truth,
)
from .rows import Unusable


@dataclass(frozen=True)
class Answering:
    """Where a row has a prompt with one answer.

    Attributes:
        columns: of the prompt.
        answer: column of the answer, or of the whole dialogue.
        labels: columns that say whether the answer is wanted, with what is said of one that isn't.
    """

    columns: PromptColumns
    answer: str
    labels: dict[str, str]

    @classmethod
    def of(cls, found: Sequence[str]) -> "Answering | None":
        """Return where they are among a dataset's columns, None where they aren't."""
        columns = prompt_columns(found)
        answer = next((name for name in ANSWERS if name in found), None) if columns.name else None
        if answer is None:
            columns, answer = (
                replace(columns, name=None, before=(), after=()),
                dialogue_column(found),
            )
        if answer is None:
            return None
        labels = {IS_SAFE: "not safe"}
        if answer in (*DIALOGUES, "completion"):
            labels[LABEL] = "not wanted"
        return cls(columns, answer, {name: labels[name] for name in labels if name in found})

    @property
    def used(self) -> set[str]:
        """Names of all columns that are read."""
        return {*self.columns.used, self.answer, *self.labels}

    def read(self, row: dict[str, Any]) -> tuple[list[Message], str]:
        """Return a row's prompt with its answer.

        Raises:
            Unusable: it has none, or none that can be read.
        """
        dialogue = dialogue_of(prompt_of(row, self.columns), row[self.answer])
        if not dialogue[-1]["content"].strip():
            raise Unusable("without an answer")
        return dialogue[:-1], dialogue[-1]["content"]

    def unwanted(self, row: dict[str, Any]) -> str | None:
        """Return what a row's labels say against its answer, None where they say nothing.

        Raises:
            Unusable: a label says neither.
        """
        for name, reason in self.labels.items():
            label = truth(row[name])
            if label is None:
                raise Unusable(f"with neither true nor false for {name}")
            if not label:
                return reason
        return None
