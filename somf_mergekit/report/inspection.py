"""How learned masks are distributed, printed and drawn."""

import os

import click

from ..common.errors import printable
from ..mask.artifact import MaskSet
from ..mask.census import MaskCensus
from ..mask.published import pinned_id
from .mask_plots import write_mask_plot
from .report_text import collapse_list, summary_table


def inspect_masks(source: str, png: str | None) -> None:
    """Print tables of learned masks by layer and kind of tensor, and draw them.

    Args:
        source: the artifact.
        png: where the plot goes, numbered where models have masks of their own; beside the masks
            where not given, or in the current folder where these are published ones.

    Raises:
        RecipeError: there is no mask, or it is damaged, or the plot can't be written.
    """
    masks = MaskSet.open(source)
    # Not into the hub's cache.
    folder = os.curdir if pinned_id(masks.path) else os.path.dirname(masks.path)
    stem, end = os.path.splitext(png or os.path.join(folder, "mask.png"))
    for number, (model, own) in enumerate(masks.each(), 1):
        census = MaskCensus(own)
        if model:
            click.echo(printable(f"mask of {model}:\n"))
        for heading, rows in (
            ("layer", census.groups("layer")),
            ("kind", [*census.groups("kind"), census.total()]),
        ):
            click.echo(summary_table(rows, heading) + "\n")
        collapses = census.collapses()
        if collapses:
            click.echo(f"masks that have collapsed:\n{printable(collapse_list(collapses))}\n")
        place = f"{stem}-{number}{end}" if model else stem + end
        write_mask_plot(census, place, f"What the mask{f' of {model}' if model else ''} keeps")
        click.echo(f"plot: {place}\n" if model else f"plot: {place}")
