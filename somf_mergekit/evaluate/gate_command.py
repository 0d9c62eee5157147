"""The command ``mergekit-somf gate``."""

import json
from pathlib import Path
from typing import Any

import click

from ..common.errors import RecipeError, printable
from ..common.files import write_whole
from .evaluate_command import MACHINE_OPTIONS, MEASURING_OPTIONS, option
from .evaluation_sets import read_sets
from .evaluation_settings import EvaluationSettings
from .gate import LESS_SAFE, POINTS, UNKNOWN, gate
from .measured_models import named_model

JSON_FILE = "gate.json"
# Exit codes; 1 is an error's.
FAILED, UNDECIDED = 2, 3
_OPTIONS = (
    option("--base", "The safe model that it was made from.", metavar="MODEL", required=True),
    option(
        "--safety",
        "Harmful prompts, which a safe model refuses.",
        metavar="FILE|HUB",
        required=True,
    ),
    option(
        "--harmless",
        "Harmless prompts; they are reported on and decide nothing.",
        metavar="FILE|HUB",
    ),
    option(
        "--out",
        f"Folder for {JSON_FILE} and what a later run goes on from; that of `evaluate` serves. "
        "Generated answers, harmful ones among them, are stored in its answers.jsonl alone.",
        type=click.Path(),
        required=True,
    ),
    option(
        "--points",
        "A loss of refusals, in percentage points, that the gate must detect.",
        type=float,
        default=POINTS,
        show_default=True,
    ),
    option(
        "--strict",
        f"Fail with exit code {UNDECIDED} where it can't tell; without, that is a warning.",
        is_flag=True,
    ),
    *MEASURING_OPTIONS,
    *MACHINE_OPTIONS,
)
_EXPLAINED = f"""Models are measured as by `evaluate`, and named as there. The exit code is {FAILED}
where MODEL refuses less of the harmful prompts than the base, 0 where it doesn't, 1 for an error.
The comparisons with parents decide nothing."""


class _Command(click.Command):
    """A command whose usage errors have the exit code of all others, 1: click's 2 is a verdict."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except click.UsageError as error:
            raise RecipeError(error.format_message()) from error


def gate_command(text: str) -> click.Command:
    """Return the command, whose help begins with ``text``."""
    arguments = [
        click.Argument(["model"], metavar="MODEL"),
        click.Argument(["parents"], nargs=-1, metavar="[PARENT]..."),
    ]
    full = f"{text}\n\n{_EXPLAINED}"
    return _Command("gate", params=[*arguments, *_OPTIONS], callback=_gate, help=full)


def _gate(model: str, parents: tuple[str, ...], base: str, out: str, **values: Any) -> None:
    strict, points, quiet = (values.pop(name) for name in ("strict", "points", "quiet"))
    sets, unread = read_sets(values.pop("safety"), values.pop("harmless"))
    found = gate(
        named_model(model),
        named_model(base),
        list(map(named_model, parents)),
        sets,
        EvaluationSettings(**values),
        out,
        points=points,
        problems=unread,
        quiet=quiet,
    )
    content = json.dumps(found.as_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(Path(out) / JSON_FILE, content + "\n")
    click.echo(printable(found.table))
    if found.verdict == LESS_SAFE:
        raise SystemExit(FAILED)
    if found.verdict == UNKNOWN:
        click.echo(
            f"warning: whether {found.model} is less safe than its base isn't known", err=True
        )
        raise SystemExit(UNDECIDED if strict else 0)
