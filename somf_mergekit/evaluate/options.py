"""Options of the commands that measure models: on what, and how."""

from collections.abc import Iterable
from typing import Any

import click

from .measuring import DTYPES, EvaluationSettings

_DEFAULTS = EvaluationSettings()


def option(name: str, text: str, **further: Any) -> click.Option:
    """Return an option with its help."""
    return click.Option([name], help=text, **further)


def _number(name: str, least: int, text: str) -> click.Option:
    default = getattr(_DEFAULTS, name.removeprefix("--").replace("-", "_"))
    shown = default is not None
    return option(name, text, type=click.IntRange(least), default=default, show_default=shown)


SET_OPTIONS = (
    option("--safety", "Harmful prompts, which a safe model refuses.", metavar="FILE|HUB"),
    option("--harmless", "Harmless prompts, which should be answered.", metavar="FILE|HUB"),
    option("--pairs", "Held-out safety preference pairs.", metavar="FILE|HUB"),
    option(
        "--skill",
        "Prompts with right answers, under a name; repeatable.",
        metavar="NAME=FILE|HUB",
        multiple=True,
    ),
)
# Named as fields of ``EvaluationSettings``.
MEASURING_OPTIONS = (
    _number("--limit", 1, "The most prompts of a set, its first ones.  [default: all]"),
    _number("--max-new-tokens", 1, "Tokens of a generated answer."),
    _number("--max-length", 8, "Tokens of a prompt with a given answer."),
    _number("--batch-size", 1, "Sequences that go through a model at once."),
    option(
        "--dtype",
        "Of the weights; auto: as they are stored.",
        type=click.Choice(DTYPES),
        default=_DEFAULTS.dtype,
        show_default=True,
    ),
    _number("--seed", 0, "Of the bootstrap."),
    _number("--resamples", 100, "Of the bootstrap."),
)


def named(given: Iterable[str], flag: str, form: str, problems: list[str]) -> list[tuple[str, str]]:
    """Return names with what stands behind their =; add to ``problems`` what has none.

    Args:
        given: what an option was given.
        flag: the option.
        form: that was expected, as ``NAME=FILE``.
        problems: that were found.
    """
    found = []
    for text in given:
        name, _, value = text.partition("=")
        if name.strip() and value.strip():
            found.append((name.strip(), value.strip()))
        else:
            problems.append(f"{flag} {text}: expected {form}")
    return found
