"""Prompts that look alike, one harmful and one harmless: whether a model knows them apart."""

from typing import Any

from ..common.digests import json_digest
from ..common.errors import RecipeError
from .chat import Message
from .conversations import PromptColumns, prompt_of
from .dataset_reading import dataset_rows
from .rows import Examples, Unusable, examples_of

# A harmful prompt and the harmless one, as messages.
LookAlikes = tuple[list[Message], list[Message]]
_COLUMNS = ("harmful", "harmless")


def read_look_alikes(
    source: str, split: str = "train", config: str | None = None
) -> Examples[LookAlikes]:
    """Return the different pairs of prompts that look alike.

    Args:
        source, split, config: see ``read_pairs``.

    Raises:
        RecipeError: the dataset can't be read, lacks one of its two columns, or has no pair.
    """
    rows = dataset_rows(source, split, config, set(_COLUMNS))
    found = rows.column_names
    if not set(_COLUMNS) <= set(found):
        raise RecipeError(
            f"dataset {source}: prompts that look alike not found. Found: "
            f"{', '.join(found) or '(none)'}. Expected 'harmful' and 'harmless', both text or "
            "message lists."
        )

    def read(_: int, row: dict[str, Any]) -> LookAlikes:
        harmful, harmless = (prompt_of(row, PromptColumns(name)) for name in _COLUMNS)
        if not harmful or not harmless:
            raise Unusable("without a prompt")
        if harmful == harmless:
            raise Unusable("with harmful equal to harmless")
        return harmful, harmless

    pairs = examples_of(rows, read, _COLUMNS, key=json_digest)
    if not pairs:
        raise RecipeError(
            f"dataset {source} has no prompts that look alike{pairs.left_out.why_none}"
        )
    return pairs
