"""The files of a report."""

import json
from pathlib import Path

from ..common.files import whole_file, write_whole
from .content import Report, report_json
from .report_text import markdown

JSON_FILE, TABLE_FILE, FIGURE_FILE = "report.json", "report.md", "report.png"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md into ``folder``.

    Raises:
        OSError: they can't be written.
    """
    content = json.dumps(report_json(report), indent=1, allow_nan=False, ensure_ascii=False)
    figure = FIGURE_FILE if report.has_figure else None
    for name, whole in ((JSON_FILE, content + "\n"), (TABLE_FILE, markdown(report, figure))):
        write_whole(folder / name, whole)


def write_figure_of(report: Report, folder: Path) -> None:
    """Write report.png into ``folder``.

    Raises:
        OSError: it can't be written.
    """
    # matplotlib is slow to come: only where it is used.
    from .mask_plots import write_report_figure

    with whole_file(folder / FIGURE_FILE) as partial:
        write_report_figure(report, partial)


def remove_figure(folder: Path) -> None:
    """Remove the plots of an earlier merge into the same folder."""
    (folder / FIGURE_FILE).unlink(missing_ok=True)
