"""A mask goes to the hub: checked, with a card, without the paths of this machine."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from ..common.errors import noted, raise_together
from ..mask.artifact import MaskSet
from ..mask.artifact_files import CARD_FILE, HISTORY_FILE, MASKS_FILE, PROVENANCE_FILE
from ..mask.published import is_hub_id, on_hub, push_files, push_problems
from ..mask.writing import write_with_record
from ..recipe.model_paths import hub_id
from .mask_card import Recorded, mask_card

# Several models or sets in one text: BASE+ADAPTER, NAME=SET,NAME=SET.
_SEVERAL = re.compile(r"(\s*[,=+]\s*)")
# What no id on the hub is: more than one slash.
_DEEP = re.compile(r"[^\s/]+(/[^\s/]+){2,}/?")


def publish(folder: str, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Store a mask on the hub, and return ``ORGANISATION/NAME@COMMIT`` of it.

    Args:
        folder: of the artifact, or of a merge.
        name: of the repository, ORGANISATION/NAME.
        private: whether a new repository is private.
        revision: a branch, made if it isn't there.

    Raises:
        RecipeError: everything that is wrong with these, together; or it can't be stored.
    """
    problems = push_problems(name, revision)
    with noted(problems):
        if os.path.isdir(folder):
            masks = MaskSet.open(folder)
            problems += masks.problems()
            Recorded.of(masks)
        else:
            problems.append(f"folder {folder} isn't there")
    raise_together(problems, "This mask can't be published")
    with tempfile.TemporaryDirectory(prefix="somf-") as work:
        place = Path(work, "mask")
        public = write_with_record(place, masks, PublicNames().in_record)
        card = mask_card(public, name, _hub_models(Recorded.of(public)))
        (place / CARD_FILE).write_text(card, encoding="utf-8")
        files = (MASKS_FILE, PROVENANCE_FILE, HISTORY_FILE, CARD_FILE)
        there = {file: str(place / file) for file in files if (place / file).exists()}
        return push_files(name, there, HISTORY_FILE, private=private, revision=revision)


def _hub_models(found: Recorded) -> list[str]:
    """Return the ids that the hub has of a mask's models, the base's first."""
    parts = [part for model in (found.base_model, *found.models) for part in model.split("+")]
    names = dict.fromkeys(part.partition("@")[0] for part in parts)
    return [name for name in names if is_hub_id(name) and not os.path.exists(name) and on_hub(name)]


class PublicNames:
    """Names in the place of this machine's paths: their last parts, each name for one path."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def in_record(self, value: Any) -> Any:
        """Return a record, or a part of it, with names in the place of paths, also in a recipe."""
        if isinstance(value, Mapping):
            return {
                self.in_record(key): self._in_recipe(item)
                if key == "recipe"
                else self.in_record(item)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.in_record(item) for item in value]
        return self._in_text(value) if isinstance(value, str) else value

    def _in_recipe(self, text: Any) -> str:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, AttributeError):
            # Made by a stranger: what can't be read can't be cleared.
            return ""
        return yaml.safe_dump(self.in_record(content), sort_keys=False, allow_unicode=True)

    def _in_text(self, text: str) -> str:
        if any(sign in text for sign in ("\n", "{%", "{{", "://")):
            # A template, or an address.
            return text
        if _is_local(text) and os.path.exists(text):
            return self._name(text)
        return "".join(
            self._name(part) if _is_local(part) else part for part in _SEVERAL.split(text)
        )

    def _name(self, path: str) -> str:
        stored = hub_id(path)
        if stored and stored != path:
            return stored
        last, number = re.split(r"[/\\]", path.rstrip("/\\"))[-1], 1
        name = last
        while self._names.setdefault(name, path) != path:
            number += 1
            name = f"{last}-{number}"
        return name


def _is_local(text: str) -> bool:
    """Return whether a text is a path, as far as it shows; what has one slash may be an id."""
    return (
        os.path.isabs(text)
        or text.startswith(("~", "./", "../", ".\\", "..\\"))
        or PureWindowsPath(text).drive != ""
        or _DEEP.fullmatch(text) is not None
        or ("/" in text and os.path.exists(text))
    )
