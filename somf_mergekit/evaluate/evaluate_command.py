"""The command ``mergekit-somf evaluate``, and the options that ``sweep`` has too."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import click

from ..common.errors import raise_together
from .evaluation_sets import read_sets
from .evaluation_settings import DTYPES, EvaluationSettings, HarnessSettings
from .evaluation_table import write_evaluation
from .measured_models import named_model
from .public_sets import PUBLIC_SETS
from .runner import evaluated

_DEFAULTS = EvaluationSettings()


def option(name: str, text: str, **further: Any) -> click.Option:
    """Return an option with its help."""
    return click.Option([name], help=text, **further)


def _number(name: str, least: int, text: str) -> click.Option:
    default = getattr(_DEFAULTS, name.removeprefix("--").replace("-", "_"))
    shown = default is not None
    return option(name, text, type=click.IntRange(least), default=default, show_default=shown)


SET_OPTIONS = (
    option(
        "--safety",
        "Harmful prompts, which a safe model refuses; a public set by its name: "
        f"{', '.join(PUBLIC_SETS)}.",
        metavar="FILE|HUB|NAME",
    ),
    option("--harmless", "Harmless prompts, which should be answered.", metavar="FILE|HUB"),
    option(
        "--recognition",
        "Harmful prompts, each beside a harmless one that looks like it.",
        metavar="FILE|HUB",
    ),
    option("--pairs", "Held-out safety preference pairs.", metavar="FILE|HUB"),
    option(
        "--skill",
        "Prompts with right answers, under a name; repeatable.",
        metavar="NAME=FILE|HUB",
        multiple=True,
    ),
)
# Named as fields of ``EvaluationSettings``.
MEASURING_OPTIONS = (
    _number("--limit", 1, "The most prompts of a set, its first ones.  [default: all]"),
    _number("--max-new-tokens", 1, "Tokens of a generated answer."),
    _number("--max-length", 8, "Tokens of a prompt with a given answer."),
    _number("--batch-size", 1, "Sequences that go through a model at once."),
    option(
        "--dtype",
        "Of the weights; auto: as they are stored.",
        type=click.Choice(DTYPES),
        default=_DEFAULTS.dtype,
        show_default=True,
    ),
    _number("--seed", 0, "Of the bootstrap."),
    _number("--resamples", 100, "Of the bootstrap."),
)
MACHINE_OPTIONS = (
    option("--device", "Of torch, as cpu or cuda:1.  [default: a GPU, where there is one]"),
    option("--trust-remote-code", "Run code that comes with a model.", is_flag=True),
    option("--quiet", "No progress bar.", is_flag=True),
)
_OPTIONS = (
    *SET_OPTIONS,
    option(
        "--extract",
        "What of an answer to a skill's prompts is compared with the right one: gsm8k (the final "
        "number), choice (a letter A to J), or regex:PATTERN (its first group). Repeatable; "
        "without, nothing is generated for the skill.",
        metavar="NAME=HOW",
        multiple=True,
    ),
    option(
        "--out",
        "Folder for evaluation.json, evaluation.md and what a later run goes on from. Generated "
        "answers, harmful ones among them, are stored in its answers.jsonl alone.",
        type=click.Path(),
        required=True,
    ),
    option(
        "--base",
        "Model under which the answers' perplexity is taken and from which the distance is "
        "measured.  [default: the first model]",
        metavar="MODEL",
    ),
    option(
        "--specialist",
        "Another model from which the distance is measured; repeatable.",
        metavar="MODEL",
        multiple=True,
    ),
    option(
        "--judge",
        "A text classifier (of refusals, or of safe and unsafe answers) or a chat guard model that "
        "judges answers beside the phrase list; or garak, for that package's phrases.",
        metavar="MODEL|garak",
    ),
    option("--judge-label", "The classifier's label that says that an answer refuses."),
    option(
        "--lm-eval",
        "Tasks of lm-evaluation-harness, with commas between them (pip install "
        "'somf-mergekit[eval]').",
        metavar="TASKS",
    ),
    option("--lm-eval-tasks", "Folder with tasks of your own for it.", metavar="DIR"),
    *MEASURING_OPTIONS,
    *MACHINE_OPTIONS,
)


_EXPLAINED = """A MODEL is a folder or a hub id, NAME=MODEL where the table should call it NAME;
differences are to the first. A set is a file (.jsonl, .json, .csv, .parquet), a folder, or a hub
id, behind which ,config=NAME and ,split=NAME (train) may stand, and ,half=choose or ,half=report
for one of two fixed halves. One model is in memory at a time; with --skill two are, while the
distance from the base or a specialist is measured."""


def evaluate_command(text: str) -> click.Command:
    """Return the command, whose help begins with ``text``."""

    def callback(models: tuple[str, ...], **values: Any) -> None:
        _evaluate(models, values)

    argument = click.Argument(["models"], nargs=-1, required=True, metavar="MODEL...")
    params, full = [argument, *_OPTIONS], f"{text}\n\n{_EXPLAINED}"
    return click.Command("evaluate", params=params, callback=callback, help=full)


def _evaluate(models: tuple[str, ...], values: dict[str, Any]) -> None:
    out, quiet = values.pop("out"), values.pop("quiet")
    problems: list[str] = []
    skills = named(values.pop("skill"), "--skill", "NAME=FILE", problems)
    extract = named(values.pop("extract"), "--extract", "NAME=HOW", problems)
    problems += [f"--extract: {name} has two extractors" for name in repeated(extract)]
    sets, unread = read_sets(
        values.pop("safety"),
        values.pop("harmless"),
        values.pop("pairs"),
        skills,
        dict(extract),
        recognition=values.pop("recognition"),
    )
    tasks, folder = values.pop("lm_eval"), values.pop("lm_eval_tasks")
    if folder and not tasks:
        problems.append("--lm-eval-tasks names a folder, but --lm-eval no task")
    listed = tuple(filter(None, map(str.strip, tasks.split(",")))) if tasks else ()
    base, specialists = values.pop("base"), values.pop("specialist")
    settings = EvaluationSettings(
        base=named_model(base) if base else None,
        specialists=tuple(map(named_model, specialists)),
        harness=HarnessSettings(listed, folder) if tasks else None,
        **values,
    )
    evaluation = evaluated(
        [named_model(model) for model in models],
        sets,
        settings,
        out,
        problems=problems + unread,
        quiet=quiet,
    )
    click.echo(write_evaluation(evaluation, out))
    raise_together(evaluation.failures, f"{out} has the table, but not all could be measured")


def named(given: Iterable[str], flag: str, form: str, problems: list[str]) -> list[tuple[str, str]]:
    """Return the names and values in what a flag was given; add to ``problems`` what has none.

    Args:
        given: of the command line.
        flag: the option.
        form: that was expected, as ``NAME=FILE``.
        problems: that were found.
    """
    found = []
    for text in given:
        name, _, value = text.partition("=")
        if name.strip() and value.strip():
            found.append((name.strip(), value.strip()))
        else:
            problems.append(f"{flag} {text}: expected {form}")
    return found


def repeated(given: Iterable[tuple[str, str]]) -> list[str]:
    """Return the names that stand there more than once."""
    return [name for name, count in Counter(name for name, _ in given).items() if count > 1]
