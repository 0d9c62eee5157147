"""Compare ways to merge specialists safely: tuned on validation, measured on test, over seeds."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .compare_call import NAME, Call, call_of, read_comparison, seeds_of, with_options
from .compare_costs import known_seconds
from .compare_plot import write_plot
from .compare_record import record_of, restore
from .compare_runs import Missing, Run
from .compare_store import claimed, read_json, write_json
from .compare_table import markdown
from .compare_work import Comparison


@click.command()
@with_options
@click.option(
    "--tune",
    callback=seeds_of,
    help="Seeds on whose validation settings are chosen.  [default: the first of --seeds]",
)
@click.option("--only", help="Names of rows, patterns as in a shell, with commas between them.")
@click.option("--list", "listed", is_flag=True, help="Say what is done and left; do nothing.")
@click.option("--table", "tabled", is_flag=True, help="Write what is known; do nothing else.")
@click.option("--keep", is_flag=True, help="Keep merged models that are measured.")
def main(
    tune: tuple[int, ...] | None,
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
    call = call_of(**options)
    comparison = read_comparison(call, tune)
    if not comparison.matching(only):
        names = ", ".join(row.name for row in comparison.order)
        raise click.ClickException(f"no row is called {only}; there are {names}")
    out, command = call.out, _command(call, tune)
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


def _command(call: Call, tune: tuple[int, ...] | None) -> str:
    seeds = ",".join(map(str, call.seeds))
    data = " --data DIR" if call.data else ""
    tuned = f" --tune {','.join(map(str, tune))}" if tune else ""
    return f"python -m benchmarks.compare{data} --seeds {seeds}{tuned}{' --quick' * call.quick}"


if __name__ == "__main__":
    main()
