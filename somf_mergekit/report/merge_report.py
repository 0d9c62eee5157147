"""A merge with its report: when each part is made, and what happens where one can't be."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..common.errors import first_line
from ..common.files import whole_file, write_whole
from ..common.machine import FULL_REPORT, NO_REPORT
from ..common.timing import LEARNING, Timer
from ..data.held_out import warn
from ..evaluate.evaluation_sets import EvaluationSets
from ..evaluate.for_recipe import measured
from ..mask.artifact import MaskSet
from ..mask.artifact_files import masks_path, training_history
from ..mask.census import MaskCensus
from ..mask.published import pinned_id
from ..prepass.plan import PlannedMerge
from ..prepass.provenance import recorded_settings
from .card import TEXT_FILE, write_section
from .content import Report, report_json
from .report_text import markdown
from .vectors import TaskVectors

JSON_FILE, FIGURE_FILE = "report.json", "report.png"
# Writes a merge into a folder with mergekit's options; further arguments are ``is_masked``, and an
# ``observer`` of its task vectors, which may be None.
Write = Callable[..., Any]


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
            self.report(f"{what}: {first_line(error)}")

    def report(self, failure: str) -> None:
        """Print and record a failure."""
        self.failures.append(failure)
        click.echo(f"somf: the merge is written, but its report lacks the {failure}", err=True)


def merge_with_report(
    write: Write,
    planned: PlannedMerge,
    masks: MaskSet,
    sets: EvaluationSets | None,
    folder: str,
    out: str,
    timer: Timer,
) -> Any:
    """Return what ``write`` returns, after reporting on the merge.

    Where held-out pairs do not speak for the merge, the last words are of that.

    Args:
        write: writes the merge.
        planned: the merge.
        masks: its mask.
        sets: what it is measured on, None for nothing.
        folder: gets the report.
        out: gets the merge.
        timer: has the seconds of each phase so far; those of the phases here are added.

    Raises:
        RecipeError: the merge can't be made. What a report lacks is said in a line.
    """
    vectors, options = TaskVectors(), planned.options
    is_reported = options.machine.report != NO_REPORT
    # Masks that were put together have no curve, and are of several places.
    given = () if masks.models else {*planned.given.values()}
    source = next((masks_path(one, options.transformers_cache) for one in given), masks.path)
    with timer.phase("merging"):
        result = write(out, options, is_masked=True, observer=vectors if is_reported else None)
    if is_reported:
        how = options.model_copy(update={"write_model_card": False})

        def write_plain(place: str) -> None:
            write(place, how, is_masked=False, observer=None)

        report = Report(planned, _origin(planned, timer), masks.provenance, vectors, timer)
        report.pinned = pinned_id(source)
        _write(report, masks, source, sets, Path(folder), out, write_plain, timer)
    warn(masks.provenance, recorded_settings(planned)["mask_kind"])
    return result


def _origin(planned: PlannedMerge, timer: Timer) -> str:
    """Return where a mask is from: ``given``, ``learned`` in this merge, or ``reused``."""
    if not planned.learners:
        return "given"
    return "learned" if LEARNING in timer else "reused"


def _write(
    report: Report,
    masks: MaskSet,
    source: str,
    sets: EvaluationSets | None,
    folder: Path,
    out: str,
    write_plain: Callable[[str], None],
    timer: Timer,
) -> None:
    """Write all of a report that can be made; ``source`` is where the masks were found."""
    planned, attempts = report.planned, Attempts()
    if report.vectors.failure:
        attempts.report(f"norms of some task vectors: {report.vectors.failure}")
    with attempts.at("measurements"):
        report.evaluation = measured(
            sets, planned.settings, planned.base_model, planned.options, out, write_plain, timer
        )
    with timer.phase("report"):
        with attempts.at("training curve"):
            report.history = training_history(os.path.dirname(source))
        with attempts.at("distribution of the mask"):
            for model, own in masks.each():
                masked = report.vectors.masked(model)
                if masked:
                    report.censuses[model] = MaskCensus(own, masked)
        with attempts.at("plots"):
            # An earlier merge into the same folder has left its own.
            (folder / FIGURE_FILE).unlink(missing_ok=True)
            if planned.options.machine.report == FULL_REPORT:
                # matplotlib takes long to import.
                from .mask_plots import write_report_figure

                with whole_file(folder / FIGURE_FILE) as partial:
                    write_report_figure(report, partial)
                report.has_figure = True
    with attempts.at("peak memory"):
        report.peak_memory = peak_memory(planned.options.device)
    report.failures = attempts.failures
    with attempts.at("text"):
        content = json.dumps(report_json(report), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / JSON_FILE, content + "\n")
        figure = FIGURE_FILE if report.has_figure else None
        write_whole(folder / TEXT_FILE, markdown(report, figure))
        if planned.options.write_model_card:
            with attempts.at("section of the model card"):
                write_section(report, folder, Path(out))
        if not planned.options.quiet:
            click.echo(f"somf: report in {folder / TEXT_FILE}", err=True)


def peak_memory(device: str | None) -> dict[str, int]:
    """Return the peaks since the process began, bytes: ``process``, and ``device`` on a GPU.

    That of the process counts the pages of files that it has mapped, and is left out where the
    operating system doesn't say.
    """
    found = {}
    status = Path("/proc/self/status")
    # What getrusage says on Linux may be the peak of the process that started this one.
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            found["process"] = 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        found["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device and device.startswith("cuda"):
        import torch

        found["device"] = torch.cuda.max_memory_allocated(device)
    return found
