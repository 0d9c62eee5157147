"""A merge with its report: when each part is made, and what happens where one can't be."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from .. import machine
from ..errors import first_line
from ..held_out import warn
from ..mask_folder import masks_path
from ..masks import MaskSet
from ..phases import phase, timed
from ..plan import PlannedMerge
from ..provenance import told_settings
from .card import write_section
from .census import MaskCensus
from .content import Report
from .curve import training_history
from .measured import measured
from .memory import peak_memory
from .record import MergeRecord, recorded_merge, unmasked_merge
from .writer import TABLE_FILE, remove_figure, write_figure_of, write_report

# Writes the merge of a recipe into a folder with mergekit's options: its run_merge.
Merge = Callable[[Any, str, Any], Any]


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


def merge_with_report(merge: Merge, config: Any, out: str, options: Any) -> Any:
    """Return what ``merge`` returns, after reporting on it.

    Where held-out pairs do not speak for the merge, the last words are of that.

    Args:
        merge: writes a recipe's merge into a folder, with mergekit's options.
        config: the recipe, a mergekit MergeConfiguration.
        out: the folder.
        options: mergekit's.

    Raises:
        RecipeError: the merge can't be made. A report that can't be made is told in a line.
    """
    extent = machine.machine_setting("report") or machine.FULL_REPORT
    is_told = extent != machine.NO_REPORT
    # mergekit writes into the recipe that it is given.
    again = config.model_copy(deep=True)
    with recorded_merge(with_vectors=is_told) as record:
        start = time.perf_counter()
        result = merge(config, out, options)
        record.end()
        record.seconds["merging"] = time.perf_counter() - start - sum(record.seconds.values())
        planned, masks = record.planned, record.masks
        if planned is not None and masks is not None:
            how = options.model_copy(update={"write_model_card": False})
            if is_told:
                _report(record, planned, masks, out, extent, lambda to: merge(again, to, how))
            warn(masks.provenance, told_settings(planned)["mask_kind"])
    return result


def _report(
    record: MergeRecord,
    planned: PlannedMerge,
    masks: MaskSet,
    out: str,
    extent: str,
    write_again: Callable[[str], Any],
) -> None:
    """Write all of a report that can be made."""
    folder, attempts = Path(record.folder), Attempts()
    if record.vectors.failure:
        attempts.tell(f"norms of some task vectors: {record.vectors.failure}")

    def write_plain(place: str) -> None:
        # What it goes through is one phase of this merge.
        with timed(), unmasked_merge(masks):
            write_again(place)

    report = Report(planned, record.origin, masks.provenance, record.vectors, record.seconds)
    with attempts.at("measurements"):
        report.evaluation = measured(planned, out, write_plain)
    with phase("report"):
        with attempts.at("training curve"):
            given = planned.settings.mask
            source = os.path.dirname(masks_path(given) if given else masks.path)
            report.history = training_history(Path(source))
        masked = record.vectors.masked()
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
