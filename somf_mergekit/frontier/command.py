"""The command ``mergekit-somf frontier``: its options, and what is done with them."""

from typing import Any

import click
from mergekit.options import MergeOptions

from ..errors import RecipeError
from ..evaluate.options import MEASURING_OPTIONS, SET_OPTIONS, named, option
from ..evaluate.settings import EvaluationSettings
from ..recipe_check import read_recipe
from .checks import sets_of
from .over import parsed_over
from .run import frontier
from .writer import FIGURE_FILE, TABLE_FILE, value_table

OPTIONS = (
    option(
        "--over",
        "A parameter of the recipe and the values that it takes, or the parameter alone for its "
        "usual ones. Of weight: factors on all models' weights. Repeatable; all values are "
        "combined with all.",
        metavar="KEY[=VALUE,...]",
        multiple=True,
        required=True,
    ),
    option(
        "--out",
        "Folder for frontier.md, frontier.json, frontier.png, the mask, and what a later run goes "
        "on from. Generated answers, harmful ones among them, are kept in measured/answers.jsonl.",
        type=click.Path(file_okay=False),
        required=True,
    ),
    *SET_OPTIONS,
    *MEASURING_OPTIONS,
    option("--relearn", "Learn a mask for each value of what decides it.", is_flag=True),
    option("--keep", "Leave the merges in the folder's `merges`.", is_flag=True),
)
NAMES = tuple(str(own.name) for own in OPTIONS)


def run_frontier(recipe_file: str, values: dict[str, Any], options: MergeOptions) -> None:
    """Make a frontier from what the command line says.

    Args:
        recipe_file: the recipe.
        values: of OPTIONS, by their names.
        options: mergekit's.

    Raises:
        RecipeError: something is wrong, or a merge failed.
    """
    out, relearn, keep = values.pop("out"), values.pop("relearn"), values.pop("keep")
    over, problems = parsed_over(values.pop("over"))
    skills = named(values.pop("skill"), "--skill", "NAME=FILE", problems)
    recipe = read_recipe(recipe_file)
    safety, harmless, pairs = (values.pop(name) for name in ("safety", "harmless", "pairs"))
    sets, unread = sets_of(recipe, safety, harmless, pairs, skills)
    settings = EvaluationSettings(
        device=options.device or "cpu", trust_remote_code=options.trust_remote_code, **values
    )
    found = frontier(
        recipe,
        over,
        out,
        sets=sets,
        settings=settings,
        options=options,
        relearn=relearn,
        keep=keep,
        problems=[*problems, *unread],
    )
    click.echo(value_table(found))
    click.echo(f"in {out}: {TABLE_FILE}, {FIGURE_FILE}")
    if found.failures:
        told = "; ".join(f"{name}: {why}" for name, why in found.failures.items())
        raise RecipeError(f"{len(found.failures)} of the frontier failed: {told}")
