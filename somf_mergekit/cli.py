"""The command ``mergekit-somf``: thin commands over the package."""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

from .common import machine
from .common import process_group as processes
from .common.errors import RecipeError, printable
from .common.requirements import installed
from .recipe import settings as recipe


class _Commands(click.Group):
    """A group whose commands know mergekit's options, without importing mergekit for --help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MAKERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _MAKERS[cmd_name]() if cmd_name in _MAKERS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_line(maker)) for name, maker in _MAKERS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Parameters of a somf recipe"):
            formatter.write_dl(
                [
                    (p.name, f"{p.help} ({p.type_text}; default: {p.default_text})")
                    for p in recipe.parameters()
                ]
            )


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(installed("somf-mergekit"))
def main() -> None:
    """Merge language models with mergekit and keep them safe (SOMF)."""


def _merge() -> click.Command:
    """Merge as mergekit-yaml does; works also where the automatic registration is off."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from .plugin.autoload import register

    register()

    def callback(**values: Any) -> None:
        from .recipe.validate import OWN_METHODS, recipe_and_problems

        # What can't be read at all; the merge reports everything else.
        recipe_and_problems(values["config_file"], OWN_METHODS)
        _keep_machine_settings(values)
        if mergekit_yaml.callback is None:
            raise click.ClickException("this mergekit has no mergekit-yaml command to call")
        mergekit_yaml.callback(**values)

    return _with_merge_options("merge", _merge, callback, ("config_file", "out_path"))


def _learn() -> click.Command:
    """Learn the mask of a recipe into a folder, without merging."""

    def callback(recipe_file: str, folder: str, **values: Any) -> None:
        from .data import held_out
        from .plugin import planner
        from .prepass import provenance

        planned, masks = planner.planned_and_learned(recipe_file, folder, _merge_options(values))
        if processes.is_first():
            click.echo(f"mask of {len(masks.names())} tensors in {os.path.dirname(masks.path)}")
            mask_kind = provenance.told_settings(planned)["mask_kind"]
            held_out.warn(masks.provenance, mask_kind)

    return _with_merge_options("learn", _learn, callback, ("recipe_file", "folder"))


def _check() -> click.Command:
    """Check a recipe, its models and its data; say what would be learned. Loads no model."""

    def callback(recipe_file: str, show: int, **values: Any) -> None:
        from .mask.artifact import MaskSet
        from .plugin import planner
        from .prepass import forecast
        from .recipe import validate as recipe_check

        options = _merge_options(values)
        config, problems = recipe_check.recipe_and_problems(recipe_file, recipe_check.OWN_METHODS)
        planned, data = planner.checked_merge(config, options, problems)
        if data is None:
            click.echo(f"recipe: right. {len(planned.tensors)} tensors; nothing is learned.")
            return
        if isinstance(data, MaskSet):
            click.echo(f"recipe: right. Mask of {len(data.names())} tensors: {data.path}")
            return
        settings = planned.settings
        expected = forecast.forecast(planned, data)
        click.echo("recipe: right. What would be learned:")
        for label, text in (
            ("tensors", f"{expected.tensors:,} at most (those that no model changed get no mask)"),
            ("mask entries", f"{expected.entries:,} at most"),
            ("pairs", f"{expected.pairs:,}"),
            ("held out", f"{len(data.held_out):,} pairs" if data.held_out else data.why_none),
            ("cut", data.cut_told(settings.max_length) or "nothing"),
            ("steps", f"{expected.steps:,} of {settings.batch_size} pairs"),
            ("micro-batch", f"{expected.micro_batch} pairs"),
            ("engine", expected.told),
        ):
            click.echo(f"  {label + ':':14}{text}")
        for note in data.notes:
            click.echo(printable(note))
        for pair in data.pairs[:show]:
            click.echo(f"\nrow {pair.row} of the safety dataset, as the model will see it:")
            for label in ("prompt", "chosen", "rejected"):
                # Where safe answers alone are learned from, there is no other.
                if ids := getattr(pair, label):
                    text = planned.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                    click.echo(f"--- {label}, {len(ids)} tokens\n{printable(text)}")

    own = [
        click.Option(
            ["--show"],
            type=click.IntRange(min=0),
            default=0,
            help="Print so many pairs as the model will see them; their text may be harmful.",
        )
    ]
    return _with_merge_options("check", _check, callback, ("recipe_file",), own)


def _inspect() -> click.Command:
    """Show how a learned mask is distributed, per layer and kind of tensor: tables and a PNG."""

    @click.command("inspect", help=_inspect.__doc__)
    @click.argument("mask", type=click.Path())
    @click.option("--png", type=click.Path(dir_okay=False), help="Where the plot goes.")
    def command(mask: str, png: str | None) -> None:
        from .mask.artifact import MaskSet
        from .mask.census import MaskCensus
        from .report.mask_plots import write_mask_plot
        from .report.report_text import collapse_list, summary_table

        masks = MaskSet.open(mask)
        census = MaskCensus(masks)
        for heading, rows in (
            ("layer", census.groups("layer")),
            ("kind", [*census.groups("kind"), census.total()]),
        ):
            click.echo(summary_table(rows, heading) + "\n")
        collapses = census.collapses()
        if collapses:
            click.echo(f"masks that have collapsed:\n{printable(collapse_list(collapses))}\n")
        place = png or os.path.join(os.path.dirname(masks.path), "mask.png")
        write_mask_plot(census, place, "What the mask keeps")
        click.echo(f"plot: {place}")

    return command


def _verify() -> click.Command:
    """Check a merge's output: the mask, whose it is, and tensors, which are computed once more."""

    def callback(folder: str, sample: int, every: bool, strict: bool, **values: Any) -> None:
        from .plugin import verify

        found = []
        for check in verify.checks(folder, _merge_options(values), None if every else sample):
            found.append(check.verdict)
            finding = " ".join(check.finding.split())
            click.echo(printable(f"{check.subject}: {check.verdict}: {finding}"))
        counts = [found.count(v) for v in (verify.RIGHT, verify.WRONG, verify.UNCHECKED)]
        click.echo("{} right, {} wrong, {} not checked".format(*counts))
        if counts[1] or (strict and counts[2]):
            raise SystemExit(1)

    own = [
        click.Option(
            ["--sample"],
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="How many tensors are computed once more.",
        ),
        click.Option(["--all", "every"], is_flag=True, help="Compute every tensor once more."),
        click.Option(["--strict"], is_flag=True, help="Fail also where something is not checked."),
    ]
    return _with_merge_options("verify", _verify, callback, ("folder",), own)


def _pack() -> click.Command:
    """Write the binary mask of a learned one with a bit an entry, to be published or kept."""

    @click.command("pack", help=_pack.__doc__)
    @click.argument("mask", type=click.Path())
    @click.argument("folder", type=click.Path(file_okay=False))
    def command(mask: str, folder: str) -> None:
        from .mask.artifact import MaskSet
        from .mask.writing import write_packed_masks

        if os.path.isdir(folder) and os.listdir(folder):
            raise RecipeError(f"folder {folder} is not empty: name a new one")
        packed = write_packed_masks(folder, MaskSet.open(mask))
        size = os.path.getsize(packed.path)
        click.echo(f"binary mask of {len(packed.names())} tensors, {size:,} bytes: {folder}")

    return command


def _evaluate() -> click.Command:
    """Measure models on the same prompts: refusals, preferences, skills, coherence, distance."""
    from .evaluate.evaluate_command import evaluate_command

    return evaluate_command(_evaluate.__doc__ or "")


def _sweep() -> click.Command:
    """Measure a recipe with other values of its parameters, or a list of recipes: a Pareto front.

    RECIPE is a recipe to sweep by --over, whose mask is learned once, or a sweep file, which lists
    recipes with what they are tuned and tested on. Merges are made, measured and deleted one by
    one; table, JSON and plot set safety against skill.
    """
    from .evaluate.sweep.sweep_command import NAMES, OPTIONS, run_sweep

    def callback(recipe: str, **values: Any) -> None:
        own = {name: values.pop(name) for name in NAMES}
        run_sweep(recipe, own, _merge_options(values))

    # Merges that do not stay have no report, and the mask's place is in the sweep's folder.
    without = ("work_dir", "report")
    return _with_merge_options("sweep", _sweep, callback, ("recipe",), OPTIONS, without)


def _demo() -> click.Command:
    """Make a small aligned model and two specialists, merge them safely, print what was gained."""

    @click.command("demo", help=_demo.__doc__)
    @click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
    @click.option("--quiet", is_flag=True, help="Print the table alone.")
    def command(folder: Path, seed: int, quiet: bool) -> None:
        from .demo import run_demo

        run_demo(folder, seed=seed, quiet=quiet)

    return command


def _doctor() -> click.Command:
    """Say whether the stock mergekit-yaml knows somf here, and what to mend if it doesn't."""

    @click.command("doctor", help=_doctor.__doc__)
    def command() -> None:
        from .plugin import doctor

        found = doctor.findings()
        for one in found:
            click.echo(printable(f"{one.subject}: {one.found}"))
            if one.remedy:
                click.echo(printable(f"  wrong: {one.remedy}"))
        if any(one.remedy for one in found):
            raise SystemExit(1)
        click.echo("mergekit-yaml knows somf")

    return command


_MAKERS: dict[str, Callable[[], click.Command]] = {
    "merge": _merge,
    "learn": _learn,
    "check": _check,
    "inspect": _inspect,
    "pack": _pack,
    "verify": _verify,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "demo": _demo,
    "doctor": _doctor,
}


def _with_merge_options(
    name: str,
    maker: Callable[[], click.Command],
    callback: Callable[..., None],
    arguments: tuple[str, ...],
    own: Sequence[click.Parameter] = (),
    without: Collection[str] = (),
) -> click.Command:
    """Return a command with options of its own, mergekit-yaml's and the machine's.

    Args:
        name: of the command.
        maker: whose docstring is its help.
        callback: runs it.
        arguments: names of its arguments.
        own: its own options.
        without: settings of the machine that it has no use for.
    """
    from mergekit.options import OPTION_CATEGORIES, PrettyPrintHelp
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    params: list[click.Parameter] = [click.Argument([argument]) for argument in arguments]
    params += own
    params += [
        click.Option(
            [option.flag], type=option.click_type, envvar=option.variable, help=option.help
        )
        for option in machine.OPTIONS
        if option.name not in without
    ]
    theirs = [p for p in mergekit_yaml.params if isinstance(p, click.Option)]
    # --help shows the sections in the order in which they come up.
    order = ("Performance", "Miscellaneous", "Output Settings", "Storage", "Dangerous Options")
    sections = [OPTION_CATEGORIES.get(str(p.name), "") for p in theirs]
    ranks = {section: order.index(section) if section in order else -1 for section in sections}
    params += sorted(theirs, key=lambda p: ranks[OPTION_CATEGORIES.get(str(p.name), "")])
    return PrettyPrintHelp(name=name, params=params, callback=callback, help=maker.__doc__)


def _keep_machine_settings(values: dict[str, Any]) -> None:
    """Move the machine's options out of ``values`` to where the pre-pass looks them up."""
    for option in machine.OPTIONS:
        value = values.pop(option.name, None)
        if value is not None:
            os.environ[option.variable] = str(value)


def _merge_options(values: dict[str, Any]) -> Any:
    from mergekit.options import MergeOptions

    from .plugin.autoload import register

    register()
    _keep_machine_settings(values)
    options = MergeOptions(**values)
    options.apply_global_options()
    return options


def _first_line(maker: Callable[[], click.Command]) -> str:
    return (maker.__doc__ or "").splitlines()[0]
