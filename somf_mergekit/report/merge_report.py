"""A merge with its report: when each part is made, and what happens where one can't be."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..common import machine
from ..common.errors import first_line
from ..common.timing import LEARNING, phase, timed
from ..data.held_out import warn
from ..evaluate.for_recipe import measured
from ..mask.artifact import MaskSet, masks_path, training_history
from ..mask.census import MaskCensus
from ..prepass.plan import PlannedMerge
from ..prepass.provenance import told_settings
from .card import write_section
from .content import Report
from .memory import peak_memory
from .report_writer import TABLE_FILE, remove_figure, write_figure_of, write_report
from .vectors import TaskVectors, recording

# Writes a merge into a folder with mergekit's options, with or without its mask.
Write = Callable[[str, Any, bool], Any]
Seconds = dict[str, float]


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
    write: Write, planned: PlannedMerge, masks: MaskSet, folder: str, out: str, seconds: Seconds
) -> Any:
    """Return what ``write`` returns, after reporting on the merge.

    Where held-out pairs do not speak for the merge, the last words are of that.

    Args:
        write: writes the merge.
        planned: the merge.
        masks: its mask.
        folder: gets the report.
        out: gets the merge.
        seconds: of each phase so far; those of the phases here are added.

    Raises:
        RecipeError: the merge can't be made. A report that can't be made is told in a line.
    """
    extent = machine.machine_setting("report") or machine.FULL_REPORT
    is_told = extent != machine.NO_REPORT
    vectors, options = TaskVectors(), planned.options
    with phase("merging"), recording(masks.path, vectors) if is_told else nullcontext():
        result = write(out, options, True)
    if is_told:
        how = options.model_copy(update={"write_model_card": False})

        def write_plain(place: str) -> None:
            # What it goes through is one phase of this merge.
            with timed():
                write(place, how, False)

        report = Report(planned, _origin(planned, seconds), masks.provenance, vectors, seconds)
        _write(report, masks, Path(folder), out, extent, write_plain)
    warn(masks.provenance, told_settings(planned)["mask_kind"])
    return result


def _origin(planned: PlannedMerge, seconds: Seconds) -> str:
    """Return where a mask is from: ``given``, ``learned`` in this merge, or ``reused``."""
    if planned.settings.mask:
        return "given"
    return "learned" if LEARNING in seconds else "reused"


def _write(
    report: Report,
    masks: MaskSet,
    folder: Path,
    out: str,
    extent: str,
    write_plain: Callable[[str], Any],
) -> None:
    """Write all of a report that can be made."""
    planned, attempts = report.planned, Attempts()
    if report.vectors.failure:
        attempts.tell(f"norms of some task vectors: {report.vectors.failure}")
    with attempts.at("measurements"):
        report.evaluation = measured(planned, out, write_plain)
    with phase("report"):
        with attempts.at("training curve"):
            given = planned.settings.mask
            source = os.path.dirname(masks_path(given) if given else masks.path)
            report.history = training_history(source)
        masked = report.vectors.masked()
        with attempts.at("distribution of the mask"):
            report.census = MaskCensus(masks, masked) if masked else None
        with attempts.at("plots"):
            remove_figure(folder)
            if extent == machine.FULL_REPORT:
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
