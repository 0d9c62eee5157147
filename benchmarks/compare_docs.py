"""The tables of the comparison that the documentation shows, written anew from the record.

A comment `<!-- compared: ROW ROW ... -->` stands before each, with the names of its rows.
"""

import json
import re
from pathlib import Path
from typing import Any

import click

from .compare_table import summary_table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/compare.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_SHOWN = re.compile(r"(<!-- compared: ([\w ]+) -->\n)(?:\n(?:\|.*\n)+)?")


def shown(text: str, record: dict[str, Any]) -> str:
    """Return a page with its marked tables as the record has them.

    Raises:
        click.ClickException: a mark names a row that the record has not.
    """
    known = {entry["row"] for entry in record["entries"]}

    def table(mark: re.Match[str]) -> str:
        names = mark[2].split()
        missing = [name for name in names if name not in known]
        if missing:
            raise click.ClickException(f"not in the record: {', '.join(missing)}")
        return f"{mark[1]}\n{summary_table(record, names)}\n"

    return _SHOWN.sub(table, text)


@click.command()
def main() -> None:
    """Write the tables in README.md and docs/ anew from the comparison's record."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = shown(text, record)
        if new != text:
            page.write_text(new, encoding="utf-8")
            click.echo(f"{page.relative_to(ROOT)}: written anew")


if __name__ == "__main__":
    main()
