"""Compare ways to merge specialists safely: tuned on validation, measured on test, over seeds."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from .compare_inputs import BRIEF, FULL, QUICK, make_inputs
from .real_training import PUBLISHED_MODEL

HERE = Path(__file__).parent
FILES = ("compare", "compare-three")
BRIEF_FILES = ("forms", "composition")
PAGES = (HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md")))
# Before a table of the documentation, with the names of its rows.
_SHOWN = re.compile(r"(<!-- compared: ([\w ]+) -->\n)(?:\n(?:\|.*\n)+)?")
# Of these tables; the record has more.
COLUMNS = ("model", "refusals", "over-refusals", "preference accuracy", "math loss", "code loss")
COLUMNS += ("skill gain kept, %", "seconds", "GiB")
_QUICK = {"max_new_tokens": 16, "max_length": 96, "batch_size": 8, "resamples": 100}


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with the sets as JSON lines (names in real_data.py).  [default: hub]",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of models, masks and records.  [default: benchmarks/work/compare]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of table, JSON and plot.  [default: benchmarks/results; for a part, WORK]",
)
@click.option(
    "--model", default=PUBLISHED_MODEL, show_default=True, help="Hub id or folder to start from."
)
@click.option("--seeds", default="0,1,2", show_default=True, help="Whole numbers.")
@click.option("--only", help="Names of rows, with commas between them.")
@click.option("--quick", is_flag=True, help="Few prompts, steps and settings, to try the script.")
@click.option(
    "--brief", is_flag=True, help="Forms of masks and their composition alone, on briefer training."
)
@click.option("--docs", is_flag=True, help="Write the documentation's tables alone.")
def main(
    data: Path | None,
    work: Path | None,
    out: Path | None,
    model: str,
    seeds: str,
    only: str | None,
    quick: bool,
    brief: bool,
    docs: bool,
) -> None:
    """Compare safe merges of a small model's specialists over seeds, and write the record.

    Needs the package with its dependencies, about 15 GB of disk, 8 GB of memory and, on two cores,
    many hours: what is done is never done again, and a call that is broken off goes on where it
    was. The same with `mergekit-somf sweep` on the files that it leaves in the work folder.
    """
    import somf_mergekit

    somf_mergekit.register()
    from somf_mergekit.evaluate.sweep import sweep, write_record

    if docs:
        write_docs()
        return
    own = f"compare{'-brief' if brief else ''}{'-quick' if quick else ''}"
    work = (work or HERE / "work" / own).resolve()
    # The record of the whole comparison is not to be lost to a part of it.
    out = out or (work if quick or only else HERE / "results")
    numbers = [int(seed) for seed in seeds.split(",")]
    effort = QUICK if quick else BRIEF if brief else FULL
    make_inputs(work, data and data.resolve(), model, numbers, effort)
    for name in BRIEF_FILES if brief else FILES:
        text = (HERE / f"{name}.yml").read_text(encoding="utf-8")
        filled = text.replace("WORK", str(work)).replace("PYTHON", sys.executable)
        content = listed(yaml.safe_load(filled), numbers, only, quick)
        if not content["recipes"]:
            continue
        (work / f"{name}.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
        record = sweep(content, {}, work / "sweep")
        # Nothing of this machine stands in the record.
        record = json.loads(json.dumps({**record, "source": text}).replace(str(work), "WORK"))
        os.makedirs(out, exist_ok=True)
        write_record(record, out, name)
        click.echo(f"record: {out / name}.md")
        if record["failures"]:
            raise click.ClickException(f"failed: {', '.join(record['failures'])}")


def listed(
    content: dict[str, Any], seeds: list[int], only: str | None, quick: bool
) -> dict[str, Any]:
    """Return a sweep file's content for the seeds, with the rows asked for and their reference."""
    names = only.split(",") if only else [row["name"] for row in content["recipes"]]
    asked = set(names) & {row["name"] for row in content["recipes"]}
    content["seeds"] = seeds if content["seeds"] != [0] else seeds[:1]
    content["recipes"] = [
        {**row, **({"seeds": seeds[:1]} if "seeds" in row else {})}
        for row in content["recipes"]
        if asked and (row["name"] in asked or row["name"] == content["reference"])
    ]
    if quick:
        content["measuring"] = _QUICK
        for row in content["recipes"]:
            _shorten(row)
    return content


def _shorten(row: dict[str, Any]) -> None:
    """Leave a row two settings, one where a command makes the model, and few steps."""
    most = 1 if "command" in row else 2
    over = row.get("over", {})
    if isinstance(over, dict):
        first = next(iter(over), None)
        over = {key: values[: most if key == first else 1] for key, values in over.items()}
    row["over"] = over[:most] if isinstance(over, list) else over
    for values in over if isinstance(over, list) else [over]:
        for name in {"max_steps", "steps"} & set(values):
            values[name] = [2] if isinstance(values[name], list) else 2
    parameters = row["recipe"].get("parameters", {}) if isinstance(row.get("recipe"), dict) else {}
    if parameters.get("max_steps", 1) and "safety_dataset" in parameters:
        parameters |= {"max_steps": 3, "batch_size": 4, "max_length": 96}


def shown(text: str, records: list[dict[str, Any]]) -> str:
    """Return a page with its marked tables as the records have them.

    Raises:
        click.ClickException: a mark names a row that no record has.
    """
    from somf_mergekit.common.console import aligned_table
    from somf_mergekit.evaluate.sweep import value_table

    def table(mark: re.Match[str]) -> str:
        names = mark[2].split()
        rows: list[dict[str, str]] = []
        for record in records:
            known = {model["name"] for model in record["models"]}
            # What one record has shown is not shown again of another.
            here = [name for name in names if name in known]
            names = [name for name in names if name not in known]
            lines = value_table(record, names=here).splitlines()
            head, _, *cells = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
            rows += [dict(zip(head, of, strict=True)) for of in cells]
        for row in rows:
            row["model"] = re.sub(r" \(chosen[^)]*\)$", "", row["model"])
        if names:
            raise click.ClickException(f"not in the record: {', '.join(names)}")
        columns = [name for name in COLUMNS if any(name in row for row in rows)]
        cells = [[row.get(column, "-") for column in columns] for row in rows]
        return f"{mark[1]}\n{aligned_table([columns, *cells])}\n"

    return _SHOWN.sub(table, text)


def write_docs() -> None:
    """Write the tables in README.md and docs/ anew from the comparison's record."""
    files = [HERE / "results" / f"{name}.json" for name in FILES]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = shown(text, records)
        if new != text:
            page.write_text(new, encoding="utf-8")
            click.echo(f"{page.name}: written anew")


if __name__ == "__main__":
    main()
