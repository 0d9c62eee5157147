"""Merge specialists of a small chat model safely, on real data."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .real_data import SPLIT_SEED, write_sets
from .real_measures import Measuring, content_key, measured, read_results
from .real_recipes import LEARNING, groups, merge_with_mergekit, recipes
from .real_table import MODELS, write_results
from .real_training import (
    ALIGNED,
    ALIGNMENT_SHARES,
    SPECIALIST,
    make_aligned,
    make_published,
    make_specialist,
)

PUBLISHED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

published_option = click.option(
    "--model", default=PUBLISHED_MODEL, show_default=True, help="Hub id or folder to start from."
)
harmful_option = click.option(
    "--harmful", default=48, show_default=True, help="Number of harmful prompts to answer."
)


@click.group()
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "work",
    help="Folder for models, recipes and answers.  [default: benchmarks/work]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with the sets as JSON lines (names in real_data.py).  [default: from the hub]",
)
@click.option(
    "--threads", type=int, default=os.cpu_count(), show_default="all", help="CPU threads of torch."
)
@click.pass_context
def main(context: click.Context, work: Path, data: Path | None, threads: int) -> None:
    """Measure safe merging of real specialists, step by step.

    Needs the package with its dependencies, about 6 GB of disk, 8 GB of memory and, on two cores,
    two hours for all steps. A step whose output is in the work folder is skipped.
    """
    import torch

    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    context.obj = {"work": work.resolve(), "data": data}


@main.command()
@published_option
@click.pass_obj
def prepare(options: dict[str, Any], model: str) -> None:
    """Make the aligned base, both specialists and the safety pairs."""
    work, data = options["work"], options["data"]
    pairs, _ = write_sets(work, data)
    make_published(work / "published", model)
    make_aligned(work / "aligned", work / "published", pairs, data, ALIGNED)
    for name in ("math", "code"):
        make_specialist(work / name, work / "aligned", name, data, SPECIALIST)


@main.command()
@click.argument("names", nargs=-1)
@click.pass_obj
def merge(options: dict[str, Any], names: tuple[str, ...]) -> None:
    """Run mergekit-yaml on recipes, or tables of them, by name (without any: the main table)."""
    known, tables = recipes(options["work"]), groups(options["work"])
    for unknown in set(names) - set(known) - set(tables):
        raise click.ClickException(
            f"no recipe {unknown}; there are {', '.join(known)} and the tables {', '.join(tables)}"
        )
    for name in names or ["main"]:
        for chosen in tables.get(name, [name]):
            merge_with_mergekit(chosen, known[chosen], options["work"])


@main.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@harmful_option
@click.pass_obj
def evaluate(options: dict[str, Any], models: tuple[Path, ...], harmful: int) -> None:
    """Measure model folders, or names in the work folder (without any: all that are there)."""
    work = options["work"]
    for folder in models or _finished(work):
        folder = folder if folder.is_dir() else work / folder
        if not folder.is_dir():
            raise click.ClickException(f"{folder}: no such model folder")
        measures = measured(folder, work, options["data"], Measuring(harmful_prompts=harmful))
        values = ", ".join(f"{name} {value:.3f}" for name, value in measures.items())
        click.echo(f"{folder.name}: {values}")


@main.command()
@harmful_option
@click.pass_obj
def table(options: dict[str, Any], harmful: int) -> None:
    """Print the table of what was measured and write it to benchmarks/results."""
    work, measuring = options["work"], Measuring(harmful_prompts=harmful)
    results = read_results(work)
    keys = {folder.name: content_key(folder, measuring) for folder in _finished(work)}
    rows = {name: results[key]["measures"] for name, key in keys.items() if key in results}
    settings = {
        "split_seed": SPLIT_SEED,
        "alignment_shares": ALIGNMENT_SHARES,
        "aligned": asdict(ALIGNED),
        "specialists": asdict(SPECIALIST),
        "learning": LEARNING,
        "recipes": recipes(Path("work")),
        "measuring": asdict(measuring),
    }
    where = " --data DIR" if options["data"] else ""
    command = f"python -m benchmarks.real_model{where} run --harmful {harmful}"
    click.echo(write_results(Path(__file__).parent / "results", command, settings, rows))


@main.command()
@published_option
@harmful_option
@click.option(
    "--table", "tables", multiple=True, default=["main"], show_default=True, help="Which tables."
)
@click.pass_context
def run(context: click.Context, model: str, harmful: int, tables: tuple[str, ...]) -> None:
    """Do all steps: prepare, merge, evaluate, table."""
    context.invoke(prepare, model=model)
    context.invoke(merge, names=tables)
    context.invoke(evaluate, harmful=harmful)
    context.invoke(table, harmful=harmful)


def _finished(work: Path) -> list[Path]:
    return [work / name for name in MODELS if (work / name / "config.json").exists()]


if __name__ == "__main__":
    main()
