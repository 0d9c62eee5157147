"""The command ``mergekit-somf``: thin commands over the package."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from .common.errors import RecipeError, printable
from .common.machine import MachineOptions
from .common.process_group import is_first
from .common.requirements import installed

# What makes each command, and the first line of its help: mergekit is imported where it is used.
_COMMANDS: dict[str, tuple[Callable[[], click.Command], str]] = {}


class _Commands(click.Group):
    """A group whose commands know mergekit's options, without importing mergekit for --help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _COMMANDS[cmd_name][0]() if cmd_name in _COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(installed("somf-mergekit"))
def main() -> None:
    """Merge language models with mergekit and keep them safe (SOMF)."""


def _command(
    *params: click.Parameter | str,
    merges: bool = False,
    without: Collection[str] = (),
    further: Callable[[], Collection[click.Parameter]] = tuple,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the commands, with its name and docstring.

    Args:
        params: its options and arguments, of which a name will do.
        merges: whether it has mergekit-yaml's options and the machine's, as ``options``.
        without: options of the machine that it has no use for.
        further: returns options whose modules are imported only where they are needed.
    """

    def add(callback: Callable[..., None]) -> Callable[..., None]:
        name, text = callback.__name__.strip("_"), callback.__doc__ or ""

        def make() -> click.Command:
            given = [p if isinstance(p, click.Parameter) else click.Argument([p]) for p in params]
            given += further()
            if not merges:
                return click.Command(name, params=given, callback=callback, help=text)
            from mergekit.options import PrettyPrintHelp

            from .common.merge_options import SomfOptions, mergekit_options
            from .plugin.autoload import register

            names = {param.name for param in given}

            def with_options(**values: Any) -> None:
                own = {name: values.pop(name) for name in names}
                register()
                callback(**own, options=SomfOptions.of_command(values))

            given += [*MachineOptions.click_options(without), *mergekit_options()]
            return PrettyPrintHelp(name=name, params=given, callback=with_options, help=text)

        _COMMANDS[name] = make, text.splitlines()[0]
        return callback

    return add


@_command("config_file", "out_path", merges=True)
def _merge(config_file: str, out_path: str, options: Any) -> None:
    """Merge as mergekit-yaml does; works also where the automatic registration is off."""
    from .plugin.planner import merge

    merge(config_file, out_path, options)


@_command("recipe_file", "folder", merges=True)
def _learn(recipe_file: str, folder: str, options: Any) -> None:
    """Learn the mask of a recipe into a folder, without merging."""
    from .plugin.planner import plan_and_mask, warn_of

    planned, masks = plan_and_mask(recipe_file, folder, options)
    if is_first():
        click.echo(f"mask of {len(masks.names())} tensors in {os.path.dirname(masks.path)}")
    warn_of(planned, masks)


@_command(
    "recipe_file",
    click.Option(
        ["--show"],
        type=click.IntRange(min=0),
        default=0,
        help="Print so many pairs as the model will see them; their text may be harmful.",
    ),
    merges=True,
)
def _check(recipe_file: str, show: int, options: Any) -> None:
    """Check a recipe, its models and its data; say what would be learned. Loads no model."""
    from .plugin.checking import print_check

    print_check(recipe_file, show, options)


@_command(click.Argument(["name"], required=False))
def _parameters(name: str | None) -> None:
    """List the parameters of a somf recipe, or explain one."""
    from .recipe.schema import explained, parameter_list
    from .recipe.settings import GROUPS, parameters

    known = parameters()
    click.echo(explained(name, known) if name else parameter_list(known, GROUPS))


@_command(
    click.Argument(["mask"], type=click.Path()),
    click.Option(["--png"], type=click.Path(dir_okay=False), help="Where the plot goes."),
)
def _inspect(mask: str, png: str | None) -> None:
    """Show how a learned mask is distributed, per layer and kind of tensor: tables and a PNG."""
    from .report.inspection import inspect_masks

    inspect_masks(mask, png)


@_command(
    click.Argument(["mask"], type=click.Path()),
    click.Argument(["folder"], type=click.Path(file_okay=False)),
)
def _pack(mask: str, folder: str) -> None:
    """Write the binary mask of a learned one with a bit an entry, to be published or stored."""
    from .mask.artifact import MaskSet
    from .mask.writing import write_packed_masks

    if os.path.isdir(folder) and os.listdir(folder):
        raise RecipeError(f"folder {folder} is not empty: name a new one")
    packed = write_packed_masks(folder, MaskSet.open(mask))
    size = os.path.getsize(packed.path)
    click.echo(f"binary mask of {len(packed.names())} tensors, {size:,} bytes: {folder}")


@_command(
    click.Argument(["mask"], type=click.Path()),
    click.Argument(["folder"], type=click.Path(file_okay=False)),
)
def _split(mask: str, folder: str) -> None:
    """Write the mask of each model of a learned set by itself, to be published or stored."""
    from .mask.artifact import MaskSet
    from .mask.writing import write_split_masks

    if os.path.isdir(folder) and os.listdir(folder):
        raise RecipeError(f"folder {folder} is not empty: name a new one")
    for model, own in write_split_masks(folder, MaskSet.open(mask)).items():
        click.echo(printable(f"mask of {model}: {os.path.dirname(own.path)}"))


@_command(
    click.Argument(["folder"], type=click.Path(file_okay=False)),
    "name",
    click.Option(["--private"], is_flag=True, help="Make a new repository private."),
    click.Option(["--revision"], metavar="BRANCH", help="Where it goes, made if it isn't there."),
)
def _push(folder: str, name: str, private: bool, revision: str | None) -> None:
    """Publish a mask on the hub, with a card, and without the paths of this machine."""
    from .report.publishing import publish

    click.echo(f"mask: {publish(folder, name, private=private, revision=revision)}")


@_command(
    "folder",
    click.Option(
        ["--sample"],
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="How many tensors are computed once more.",
    ),
    click.Option(["--all", "every"], is_flag=True, help="Compute every tensor once more."),
    click.Option(["--strict"], is_flag=True, help="Fail also where something is not checked."),
    merges=True,
)
def _verify(folder: str, sample: int, every: bool, strict: bool, options: Any) -> None:
    """Check a merge's output: the mask, whose it is, and tensors, which are computed once more."""
    from .plugin import verify

    found = []
    for check in verify.checks(folder, options, None if every else sample):
        found.append(check.verdict)
        finding = " ".join(check.finding.split())
        click.echo(printable(f"{check.subject}: {check.verdict}: {finding}"))
    counts = [found.count(v) for v in (verify.RIGHT, verify.WRONG, verify.UNCHECKED)]
    click.echo("{} right, {} wrong, {} not checked".format(*counts))
    if counts[1] or (strict and counts[2]):
        raise SystemExit(1)


def _evaluate() -> click.Command:
    """Measure models on the same prompts: refusals, preferences, skills, coherence, distance."""
    from .evaluate.evaluate_command import evaluate_command

    return evaluate_command(_evaluate.__doc__ or "")


_COMMANDS["evaluate"] = _evaluate, _evaluate.__doc__ or ""


def _gate() -> click.Command:
    """Say whether a merge is less safe than its base and its parents, by what they refuse."""
    from .evaluate.gate_command import gate_command

    return gate_command(_gate.__doc__ or "")


_COMMANDS["gate"] = _gate, _gate.__doc__ or ""


def _sweep_options() -> Collection[click.Parameter]:
    from .evaluate.sweep.sweep_command import OPTIONS

    return OPTIONS


# Merges that do not stay have no report, and the mask's place is in the sweep's folder.
@_command("recipe", merges=True, without=("work_dir", "report"), further=_sweep_options)
def _sweep(recipe: str, options: Any, **values: Any) -> None:
    """Measure a recipe with other values of its parameters, or a list of recipes: a Pareto front.

    RECIPE is a recipe to sweep by --over, whose mask is learned once, or a sweep file, which lists
    recipes with what they are tuned and tested on. Merges are made, measured and deleted one by
    one; table, JSON and plot set safety against skill.
    """
    from .evaluate.sweep.sweep_command import run_sweep

    run_sweep(recipe, values, options)


@_command(
    click.Argument(["folder"], type=click.Path(file_okay=False, path_type=Path)),
    click.Option(["--seed"], type=click.IntRange(min=0), default=0, show_default=True),
    click.Option(["--quiet"], is_flag=True, help="Print the table alone."),
)
def _demo(folder: Path, seed: int, quiet: bool) -> None:
    """Make a small aligned model and two specialists, merge them safely, print what was gained."""
    from .demo import run_demo

    run_demo(folder, seed=seed, quiet=quiet)


@_command()
def _doctor() -> None:
    """Say whether the stock mergekit-yaml knows somf here, and what to mend if it doesn't."""
    from .plugin import doctor

    found = doctor.findings()
    for one in found:
        click.echo(printable(f"{one.subject}: {one.found}"))
        if one.remedy:
            click.echo(printable(f"  wrong: {one.remedy}"))
    if any(one.remedy for one in found):
        raise SystemExit(1)
    click.echo("mergekit-yaml knows somf")
