"""What a recipe would do, printed: nothing is loaded for it."""

import click

from ..common.errors import printable
from ..common.merge_options import SomfOptions
from ..prepass.forecast import forecast
from ..recipe.validate import recipe_and_problems
from .merge_check import OWN_METHODS, checked_merge


def print_check(recipe_file: str, show: int, options: SomfOptions) -> None:
    """Check a recipe, its models and its data, and print what would be learned.

    Args:
        recipe_file: the recipe.
        show: how many pairs are printed as the model will see them.
        options: mergekit's and the machine's.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    config, problems = recipe_and_problems(recipe_file, OWN_METHODS)
    planned, inputs, _ = checked_merge(config, options, problems)
    data = inputs.data if inputs else None
    if data is None:
        click.echo(f"recipe: OK. {len(planned.tensors)} tensors; nothing is learned.")
    for model, own in inputs.given.items() if inputs else ():
        use = "learned on" if own.is_start else "used as it is"
        where = f"{len(own.masks.names())} tensors in {own.masks.path}"
        click.echo(printable(f"mask of {model}, {use}: {where}"))
    if data is None:
        return
    settings, expected = planned.settings, forecast(planned, data)
    most, chosen = "", []
    if data.validation:
        most, chosen = "at most ", [("chosen by", f"{len(data.validation):,} further pairs")]
    click.echo("recipe: OK. What would be learned:")
    for label, text in (
        ("tensors", f"{expected.tensors:,} at most (those that no model changed get no mask)"),
        ("mask entries", f"{expected.entries:,} at most"),
        ("pairs", f"{expected.pairs:,}"),
        ("held out", f"{len(data.held_out):,} pairs" if data.held_out else data.why_none),
        *chosen,
        ("cut", data.cut_text(settings.max_length) or "nothing"),
        ("steps", f"{most}{expected.steps:,} of {settings.batch_size} pairs"),
        ("micro-batch", f"{expected.micro_batch} pairs"),
        ("engine", expected.line),
    ):
        click.echo(f"  {label + ':':14}{text}")
    for note in data.notes:
        click.echo(printable(note))
    for pair in data.pairs[:show]:
        click.echo(f"\nrow {pair.row} of the safety dataset, as the model will see it:")
        for label in ("prompt", "chosen", "rejected"):
            # Where safe answers alone are learned from, there is no other.
            if ids := getattr(pair, label):
                text = planned.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                click.echo(f"--- {label}, {len(ids)} tokens\n{printable(text)}")
