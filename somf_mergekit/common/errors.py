"""The one error class for mistakes in a recipe, its models or its data."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import click


@lru_cache(maxsize=1)
def _log() -> logging.Logger:
    log = logging.getLogger("somf_mergekit")
    if os.environ.get("SOMF_DEBUG", "0") not in ("", "0"):
        log.setLevel(logging.DEBUG)
        log.addHandler(logging.StreamHandler())
        log.propagate = False
    return log


class RecipeError(click.ClickException, ValueError):
    """A mistake that the person who wrote the recipe can mend.

    click commands (``mergekit-yaml`` among them) print it as one ``Error: ...`` message and
    exit with code 1; Python callers can catch it as a ``ValueError``.

    Attributes:
        problems: what is wrong, a sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = list(problems) or [message]

    def __str__(self) -> str:
        return self.message

    def format_message(self) -> str:
        """Return the message as a terminal may show it."""
        if self.__cause__ is not None:
            log_traceback(self)
        return printable(self.message)


def printable(text: str) -> str:
    """Return a text whose signs that can't be printed are escaped.

    Names of columns and tensors come from strangers; signs in them could steer a terminal.
    """
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode()
        for sign in text
    )


def raise_together(problems: Iterable[str], heading: str) -> None:
    """Raise one RecipeError that lists all ``problems``; do nothing where there are none."""
    found = list(dict.fromkeys(problems))
    if not found:
        return
    if len(found) == 1:
        raise RecipeError(f"{heading}: {found[0]}", found)
    lines = "\n".join(f"  - {problem}" for problem in found)
    raise RecipeError(f"{heading}: {len(found)} problems\n{lines}", found)


@contextmanager
def noted(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Add what is raised inside as a RecipeError to ``problems``, and go on."""
    try:
        yield
    except RecipeError as error:
        problems += [prefix + problem for problem in error.problems]


def log_traceback(error: BaseException) -> None:
    """Log the traceback of an error at debug level, which SOMF_DEBUG=1 shows."""
    _log().debug("%s", type(error).__name__, exc_info=error)


def first_line(error: BaseException) -> str:
    """Return what an error says first, its kind where it says nothing.

    The line may be all that is reported of a fault of ours: its traceback is logged.
    """
    log_traceback(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def few(names: Collection[str]) -> str:
    """Return the first of some names, and how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def quoted(names: Iterable[str]) -> str:
    """Return names of columns as a message lists them."""
    return ", ".join(f"'{name}'" for name in names)
