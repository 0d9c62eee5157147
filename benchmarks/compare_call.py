"""What the commands on a comparison share: their options, and the comparison that these name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from somf_mergekit.evaluate import EvaluationSettings

from .compare_models import QUICK, Models, Trainings
from .compare_rows import Learning, comparison_rows
from .compare_runs import Bench
from .compare_splits import HELD_BACK, SIZES, VALIDATION, Sizes, read_splits
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
QUICK_LEARNING = Learning(steps=4, fewer=2, batch_size=4, max_length=96)
NAME = "compare"


@dataclass(frozen=True)
class Call:
    """What the shared options say.

    Attributes:
        work: folder of models, masks and records.
        data: folder of the sets, None for the hub.
        model: hub id or folder to start from.
        seeds: that are tested.
        quick: few prompts, steps and settings.
        out: folder of what is written to be kept.
    """

    work: Path
    data: Path | None
    model: str
    seeds: tuple[int, ...]
    quick: bool
    out: Path


def seeds_of(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Return the seeds of an option, None where it is not given.

    Raises:
        click.BadParameter: they are no whole numbers.
    """
    if value is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 0,1,2") from error


_OPTIONS = (
    click.option(
        "--work",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder for models, masks and records.  [default: work/{NAME} in benchmarks]",
    ),
    click.option(
        "--data",
        type=click.Path(file_okay=False, exists=True, path_type=Path),
        help="Folder with the sets as JSON lines (names in real_data.py).  [default: from the hub]",
    ),
    click.option(
        "--model",
        default=PUBLISHED_MODEL,
        show_default=True,
        help="Hub id or folder to start from.",
    ),
    click.option("--seeds", default="0,1,2", show_default=True, callback=seeds_of),
    click.option(
        "--quick", is_flag=True, help="Few prompts, steps and settings, to try the script."
    ),
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the record.  [default: benchmarks/results; with --quick the work folder]",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own]"),
)


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options; ``call_of`` takes their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def call_of(
    work: Path | None,
    out: Path | None,
    threads: int | None,
    data: Path | None,
    model: str,
    seeds: tuple[int, ...],
    quick: bool,
) -> Call:
    """Return what the shared options say, with their defaults; the threads are set."""
    if threads:
        import torch

        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    here = Path(__file__).parent
    work = (work or here / "work" / (f"{NAME}-quick" if quick else NAME)).resolve()
    out = out or (work if quick else here / "results")
    return Call(work, data and data.resolve(), model, seeds, quick, out)


def read_comparison(call: Call, tune: tuple[int, ...] | None = None) -> Comparison:
    """Return the comparison in a work folder, none of it done.

    Args:
        call: which one.
        tune: the seeds on whose validation settings are chosen, the first where not given.

    Raises:
        click.ClickException: a seed is to be tuned on and not tested, or the folder saw other data.
    """
    tuning = tune or call.seeds[:1]
    if not set(tuning) <= set(call.seeds):
        raise click.ClickException("--tune names seeds that are not among --seeds")
    models = Models(
        work=call.work,
        data=call.data,
        source=call.model,
        trainings=QUICK if call.quick else Trainings(),
    )
    call.work.mkdir(parents=True, exist_ok=True)
    pairs, held_out = models.write_sets()
    sets = read_splits(call.data, pairs, held_out, QUICK_SIZES if call.quick else SIZES)
    bench = Bench(models, pairs, sets, QUICK_MEASURING if call.quick else MEASURING)
    learning = QUICK_LEARNING if call.quick else Learning()
    rows = {seed: comparison_rows(seed, learning, call.quick) for seed in call.seeds}
    return Comparison(bench, rows, tuning)
