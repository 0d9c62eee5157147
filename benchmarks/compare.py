"""Compare ways to merge specialists safely: tuned on validation, measured on test, over seeds."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from somf_mergekit.evaluate import EvaluationSettings

from .compare_costs import known_seconds
from .compare_models import QUICK, Models, Trainings
from .compare_plot import write_plot
from .compare_record import record_of, restore
from .compare_rows import Learning, comparison_rows
from .compare_runs import Bench, Missing, Run
from .compare_splits import HELD_BACK, SIZES, VALIDATION, Sizes, read_splits
from .compare_store import claimed, read_json, write_json
from .compare_table import markdown
from .compare_work import Comparison
from .real_training import PUBLISHED_MODEL

# The bootstrap's intervals are not used: what counts is the spread over seeds.
# Models are measured as most are run, in bfloat16; but see Bench for losses.
MEASURING = EvaluationSettings(
    max_new_tokens=48, max_length=128, batch_size=16, dtype="bfloat16", resamples=100
)
QUICK_SIZES = {
    VALIDATION: Sizes(harmful=6, harmless=6, pairs=8, skill_answers=4),
    HELD_BACK: Sizes(harmful=8, harmless=8, pairs=8, skill_answers=4),
}
QUICK_MEASURING = EvaluationSettings(max_new_tokens=16, max_length=96, batch_size=8, resamples=100)
QUICK_LEARNING = Learning(steps=2, batch_size=4, max_length=96)
NAME = "compare"


def _seeds(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 0,1,2") from error


@click.command()
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for models, masks and records.  [default: benchmarks/work/compare]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with the sets as JSON lines (names in real_data.py).  [default: from the hub]",
)
@click.option(
    "--model", default=PUBLISHED_MODEL, show_default=True, help="Hub id or folder to start from."
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_seeds)
@click.option(
    "--tune",
    callback=_seeds,
    help="Seeds on whose validation settings are chosen.  [default: the first of --seeds]",
)
@click.option("--only", help="Names of rows, patterns as in a shell, with commas between them.")
@click.option("--list", "listed", is_flag=True, help="Say what is done and left; do nothing.")
@click.option("--table", "tabled", is_flag=True, help="Write what is known; do nothing else.")
@click.option("--quick", is_flag=True, help="Few prompts, steps and settings, to try the script.")
@click.option("--keep", is_flag=True, help="Keep merged models that are measured.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the record.  [default: benchmarks/results; with --quick the work folder]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own]")
def main(
    work: Path | None,
    out: Path | None,
    threads: int | None,
    only: str | None,
    listed: bool,
    tabled: bool,
    keep: bool,
    **options: Any,
) -> None:
    """Compare safe merges of a small model's specialists over seeds, and write the record.

    Needs the package with its dependencies, about 15 GB of disk, 8 GB of memory and, on two cores,
    many hours: what is done is never done again, a call that is broken off goes on where it was,
    several calls share the work, and what a record in --out tells of the same runs is taken from
    it, so that another machine goes on too.
    """
    if threads:
        import torch

        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    quick = options["quick"]
    here = Path(__file__).parent
    work = (work or here / "work" / (f"{NAME}-quick" if quick else NAME)).resolve()
    out = out or (work if quick else here / "results")
    comparison = read_comparison(work, **options)
    if not comparison.matching(only):
        names = ", ".join(row.name for row in comparison.order)
        raise click.ClickException(f"no row is called {only}; there are {names}")
    command = _command(options, quick)
    restored = restore(comparison, read_json(out / f"{NAME}.json"))
    if restored:
        click.echo(f"{restored} runs are known from the record in {out}")
    if listed:
        click.echo(listing(comparison, only))
        return
    failed: list[str] = []
    try:
        if not tabled:
            with _ending_in_order():
                failed = _work(
                    comparison, only, keep, lambda: write_record(comparison, out, command)
                )
    finally:
        click.echo(f"record: {write_record(comparison, out, command)}")
    if failed:
        raise click.ClickException(f"{len(failed)} runs failed: {', '.join(failed)}")


def read_comparison(
    work: Path,
    data: Path | None,
    model: str,
    seeds: tuple[int, ...],
    tune: tuple[int, ...] | None,
    quick: bool,
) -> Comparison:
    """Return the comparison in a work folder, none of it done.

    Raises:
        click.ClickException: a seed is to be tuned on and not tested, or the folder saw other data.
    """
    tuning = tune or seeds[:1]
    if not set(tuning) <= set(seeds):
        raise click.ClickException("--tune names seeds that are not among --seeds")
    models = Models(
        work=work,
        data=data and data.resolve(),
        source=model,
        trainings=QUICK if quick else Trainings(),
    )
    work.mkdir(parents=True, exist_ok=True)
    pairs, held_out = models.write_sets()
    sets = read_splits(data, pairs, held_out, QUICK_SIZES if quick else SIZES)
    bench = Bench(models, pairs, sets, QUICK_MEASURING if quick else MEASURING)
    learning = QUICK_LEARNING if quick else Learning()
    rows = {seed: comparison_rows(seed, learning, quick) for seed in seeds}
    return Comparison(bench, rows, tuning)


def listing(comparison: Comparison, only: str | None) -> str:
    """Return what is done and left of each row, with the time that is left by what was measured."""
    known = known_seconds(comparison.bench.models.work)
    lines, whole = [], Missing()
    for row, settings in comparison.wanted(only):
        missing = {k: v for k, v in comparison.missing(row, settings).items() if k not in whole}
        whole |= missing
        choice = comparison.choice(row)
        tuned = len(row.settings) > 1 and choice is not None
        chosen = f", chosen: {choice.setting}" if choice and tuned else ""
        state = f"{len(missing)} steps left, {_hours(missing, known)}" if missing else "done"
        lines.append(f"{row.name}: {state}{chosen}")
    lines.append(f"all: {len(whole)} steps left, {_hours(whole, known)}")
    unknown = sorted(set(whole.values()) - set(known))
    if unknown:
        lines.append(f"+ what was not timed here yet: {', '.join(unknown)}")
    return "\n".join(lines)


def write_record(comparison: Comparison, out: Path, command: str) -> Path:
    """Write JSON, table and plot of what is known, and return the table's file."""
    out.mkdir(parents=True, exist_ok=True)
    plot, table = out / f"{NAME}.png", out / f"{NAME}.md"
    with claimed(comparison.bench.models.work / ".record.lock", wait=True):
        record = record_of(comparison, command)
        has_plot = write_plot(record, plot)
        write_json(out / f"{NAME}.json", record)
        table.write_text(markdown(record, plot.name if has_plot else None), encoding="utf-8")
    return table


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """When ended from outside, end what was started, and write what is known."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(
    comparison: Comparison, only: str | None, keep: bool, write: Callable[[], object]
) -> list[str]:
    """Do what is left, write the record after each run, and return the names of failed runs."""
    failed: list[str] = []
    free = shutil.disk_usage(comparison.bench.models.work).free
    click.echo(f"{free / 2**30:.0f} GiB of disk are free")

    def on_run(run: Run, split: str) -> None:
        start = time.perf_counter()
        name = f"seed {run.seed}, {run.name}, {split}"
        try:
            run.measure(split)
        except click.ClickException as error:
            # The others do not depend on it; the next call tries again.
            failed.append(name)
            click.echo(f"{name}: failed: {error.message}", err=True)
            return
        values = run.measures(split) or {}
        told = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
        click.echo(f"{name}: {told} ({time.perf_counter() - start:.0f} s)")
        write()

    comparison.work_through(only, keep=keep, on_run=on_run)
    return failed


def _hours(missing: Missing, known: dict[str, float]) -> str:
    seconds = sum(known.get(kind, 0.0) for kind in missing.values())
    more = " +" if set(missing.values()) - set(known) else ""
    return f"{seconds / 3600:.1f} h{more}"


def _command(options: dict[str, Any], quick: bool) -> str:
    seeds = ",".join(map(str, options["seeds"]))
    data = " --data DIR" if options["data"] else ""
    tune = f" --tune {','.join(map(str, options['tune']))}" if options["tune"] else ""
    return f"python -m benchmarks.compare{data} --seeds {seeds}{tune}{' --quick' * quick}"


if __name__ == "__main__":
    main()
