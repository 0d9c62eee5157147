"""What is shown: tables, and no progress bars but our own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def no_model_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every model that it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def aligned_table(rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Return a markdown table with aligned columns.

    Args:
        rows: the cells, those of the header first.
        labels: how many columns at the left are labels, which are aligned at their left; the
            others hold numbers and are aligned at their right.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column < labels else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = [
        "-" * (width + 1) + ("-" if column < labels else ":") for column, width in enumerate(widths)
    ]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])
