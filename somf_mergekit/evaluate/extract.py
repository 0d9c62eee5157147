"""What an answer says in the end: a number, a choice, or what a pattern finds."""

import difflib
import re
from collections.abc import Callable
from decimal import Decimal

from ..common.errors import RecipeError

Extractor = Callable[[str], str | None]
REGEX = "regex:"
_NUMBER = re.compile(r"(?<![\w.])-?\$?(\d[\d,]*(?:\.\d+)?)", re.ASCII)
_CHOICES = (
    re.compile(r"(?i:\banswer\b\W*(?:is|:)?)\W*\b([A-J])\b"),
    re.compile(r"^\W*([A-J])\s*(?:[).:,]|$)"),
    re.compile(r"\(([A-J])\)"),
)


def final_number(text: str) -> str | None:
    """Return the number after GSM8K's ``####``, or else the last one, without commas and signs.

    2, 2.0 and $2.00 are the same.
    """
    marked = text.rpartition("####")[2] if "####" in text else text
    found = list(_NUMBER.finditer(marked))
    if not found:
        return None
    chosen = found[0 if "####" in text else -1]
    number = Decimal(chosen.group(1).replace(",", "")).normalize()
    return f"{-number if chosen.group().startswith('-') else number:f}"


def choice_letter(text: str) -> str | None:
    """Return the letter (A to J) that is chosen.

    That is the last one after "answer" or "answer is", else one that opens the text and is
    followed by a bracket, a stop, a colon, a comma or nothing, else the last one in brackets.
    """
    for pattern in _CHOICES:
        found = pattern.findall(text.strip())
        if found:
            return str(found[-1])
    return None


_KNOWN: dict[str, Extractor] = {"gsm8k": final_number, "choice": choice_letter}


def extractor(text: str) -> Extractor:
    """Return the extractor called ``text``: ``gsm8k``, ``choice`` or ``regex:PATTERN``.

    A pattern gives its first group, or all it matches where it has none, of its first match.

    Raises:
        RecipeError: there is no such extractor, or the pattern is no regular expression.
    """
    if text in _KNOWN:
        return _KNOWN[text]
    if not text.startswith(REGEX):
        near = difflib.get_close_matches(text, _KNOWN, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(
            f"unknown extractor {text!r}{meant}; known are {', '.join(_KNOWN)} and {REGEX}PATTERN"
        )
    try:
        pattern = re.compile(text.removeprefix(REGEX))
    except re.error as error:
        raise RecipeError(f"{text!r} is no regular expression: {error}") from error

    def matched(answer: str) -> str | None:
        found = pattern.search(answer)
        text = found and found.group(1 if pattern.groups else 0)
        return text.strip() if text else None

    return matched
