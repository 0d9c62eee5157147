"""A merge with its report: when each part is made, and what happens where one can't be."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..common.errors import first_line
from ..common.machine import FULL_REPORT, NO_REPORT
from ..common.timing import LEARNING, Timer
from ..data.held_out import warn
from ..evaluate.for_recipe import measured
from ..mask.artifact import MaskSet
from ..mask.artifact_folder import masks_path
from ..mask.census import MaskCensus
from ..prepass.plan import PlannedMerge
from ..prepass.provenance import recorded_settings
from .card import write_section
from .content import Report
from .curve import training_history
from .memory import peak_memory
from .report_writer import TABLE_FILE, remove_figure, write_figure_of, write_report
from .vectors import TaskVectors, recording

# Writes a merge into a folder with mergekit's options, with or without its mask.
Write = Callable[[str, Any, bool], Any]


@dataclass
class Attempts:
    """Parts of a report, each of which may fail without harm to the merge or to the others.

    Attributes:
        failures: what could not be made and why, a sentence each.
    """

    failures: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Try to make a part: a merge that took hours stands, whatever its report comes across."""
        try:
            yield
        except Exception as error:
            self.tell(f"{what}: {first_line(error)}")

    def tell(self, failure: str) -> None:
        """Tell and keep a failure."""
        self.failures.append(failure)
        click.echo(f"somf: the merge is written, but its report lacks the {failure}", err=True)


def merge_with_report(
    write: Write, planned: PlannedMerge, masks: MaskSet, folder: str, out: str, timer: Timer
) -> Any:
    """Return what ``write`` returns, after reporting on the merge.

    Where held-out pairs do not speak for the merge, the last words are of that.

    Args:
        write: writes the merge.
        planned: the merge.
        masks: its mask.
        folder: gets the report.
        out: gets the merge.
        timer: has the seconds of each phase so far; those of the phases here are added.

    Raises:
        RecipeError: the merge can't be made. A report that can't be made is told in a line.
    """
    vectors, options = TaskVectors(), planned.options
    is_told = options.machine.report != NO_REPORT
    with timer.phase("merging"), recording(masks.path, vectors) if is_told else nullcontext():
        result = write(out, options, True)
    if is_told:
        how = options.model_copy(update={"write_model_card": False})

        def write_plain(place: str) -> None:
            write(place, how, False)

        report = Report(planned, _origin(planned, timer), masks.provenance, vectors, timer)
        _write(report, masks, Path(folder), out, write_plain, timer)
    warn(masks.provenance, recorded_settings(planned)["mask_kind"])
    return result


def _origin(planned: PlannedMerge, timer: Timer) -> str:
    """Return where a mask is from: ``given``, ``learned`` in this merge, or ``reused``."""
    if planned.settings.mask:
        return "given"
    return "learned" if LEARNING in timer else "reused"


def _write(
    report: Report,
    masks: MaskSet,
    folder: Path,
    out: str,
    write_plain: Callable[[str], None],
    timer: Timer,
) -> None:
    """Write all of a report that can be made."""
    planned, attempts = report.planned, Attempts()
    if report.vectors.failure:
        attempts.tell(f"norms of some task vectors: {report.vectors.failure}")
    with attempts.at("measurements"):
        report.evaluation = measured(
            planned.settings, planned.base_model, planned.options, out, write_plain, timer
        )
    with timer.phase("report"):
        with attempts.at("training curve"):
            given = planned.settings.mask
            source = os.path.dirname(masks_path(given) if given else masks.path)
            report.history = training_history(Path(source))
        masked = report.vectors.masked()
        with attempts.at("distribution of the mask"):
            report.census = MaskCensus(masks, masked) if masked else None
        with attempts.at("plots"):
            remove_figure(folder)
            if planned.options.machine.report == FULL_REPORT:
                write_figure_of(report, folder)
                report.has_figure = True
    with attempts.at("peak memory"):
        report.peak_memory = peak_memory(planned.options.device)
    report.failures = attempts.failures
    with attempts.at("text"):
        write_report(report, folder)
        if planned.options.write_model_card:
            with attempts.at("section of the model card"):
                write_section(report, folder, Path(out))
        if not planned.options.quiet:
            click.echo(f"somf: report in {folder / TABLE_FILE}", err=True)
