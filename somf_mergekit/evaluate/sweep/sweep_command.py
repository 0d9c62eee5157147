"""The command ``mergekit-somf sweep``: its options, and what is done with them."""

from collections.abc import Iterable
from typing import Any

import click
from click.core import ParameterSource
from mergekit.options import MergeOptions

from ...common.errors import RecipeError
from ..evaluate_command import MEASURING_OPTIONS, SET_OPTIONS, named, option, repeated
from ..evaluation_settings import EvaluationSettings
from .sweep_file import Sources
from .sweep_table import NAME, value_table
from .sweeping import content_of, is_sweep_file, sweep

OPTIONS = (
    option(
        "--over",
        "A parameter of the recipe and its values, or the parameter alone for its usual ones. Of "
        "weight: factors on all models' weights. Repeatable; all values are combined with all.",
        metavar="KEY[=VALUE,...]",
        multiple=True,
    ),
    option(
        "--out",
        f"Folder for {NAME}.md, {NAME}.json, {NAME}.png, the masks, and what a later run goes on "
        "from. Generated answers, harmful ones among them, are stored in measured/answers.jsonl.",
        type=click.Path(file_okay=False),
        required=True,
    ),
    *SET_OPTIONS,
    option("--relearn", "Learn a mask for each value of what decides it.", is_flag=True),
    option("--keep", "Leave the merges in the folder's `merges`.", is_flag=True),
    *MEASURING_OPTIONS,
)
NAMES = tuple(str(own.name) for own in OPTIONS)
# What is said beside a sweep file too.
_OF_ALL = ("out", "keep")


def run_sweep(source: str, values: dict[str, Any], options: MergeOptions) -> None:
    """Make a sweep from what the command line says.

    Args:
        source: the file of a recipe, or of a sweep.
        values: of OPTIONS, by their names.
        options: mergekit's.

    Raises:
        RecipeError: something is wrong, or a merge failed.
    """
    out, relearn, keep = values.pop("out"), values.pop("relearn"), values.pop("keep")
    over, problems = _parsed(values.pop("over"))
    skills = named(values.pop("skill"), "--skill", "NAME=FILE", problems)
    problems += [f"--skill {name}: two skills have this name" for name in repeated(skills)]
    sources = {name: values.pop(name) for name in ("safety", "harmless", "recognition", "pairs")}
    settings = EvaluationSettings(
        device=options.device or "cpu", trust_remote_code=options.trust_remote_code, **values
    )
    if is_sweep_file(content_of(source)):
        context = click.get_current_context()
        for own in OPTIONS:
            given = context.get_parameter_source(str(own.name)) is ParameterSource.COMMANDLINE
            if given and own.name not in _OF_ALL:
                problems.append(f"{own.opts[0]}: is for one recipe; say it in {source}")
    record = sweep(
        source,
        over,
        out,
        sources=Sources(**sources, skills=dict(skills)),
        settings=settings,
        options=options,
        relearn=relearn,
        keep=keep,
        problems=problems,
    )
    click.echo(value_table(record))
    click.echo(f"in {out}: {NAME}.md, {NAME}.png")
    failures = record["failures"]
    if failures:
        listed = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise RecipeError(f"{len(failures)} of the sweep failed: {listed}")


def _parsed(texts: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values in ``KEY=V1,V2`` by key, none for ``KEY`` alone, and what is wrong."""
    found: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        values = [value.strip() for value in rest.split(",")] if equals else []
        if not key or (equals and not all(values)):
            problems.append(f"--over {text}: expected KEY or KEY=VALUE,VALUE,...")
        elif key in found:
            problems.append(f"--over {text}: {key} is swept already; put all its values into one")
        else:
            found[key] = values
    return found, problems
