"""A frontier from its first check to its files."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions

from ..errors import RecipeError, first_line
from ..evaluate.sets import HARMFUL, HARMLESS, PAIRS, EvaluationSets
from ..evaluate.settings import EvaluationSettings
from ..evaluate.store import Store
from ..files import locked
from ..learner.interruption import LearningInterrupted
from ..masks import MaskSet
from ..recipe import recipe_settings
from ..recipe_blocks import recipe_text
from ..recipe_check import read_recipe
from ..rendering import Rendering
from .axes import axes_of
from .checks import Prepared, prepared, sets_of
from .making import MEASURED_FOLDER, Making
from .points import BASE, BASE_LABEL, PLAIN
from .result import Entry, Frontier, placed
from .writer import write_frontier


def frontier(
    source: str | os.PathLike[str] | Mapping[str, Any],
    over: Mapping[str, Sequence[Any]],
    out: str | os.PathLike[str],
    *,
    sets: EvaluationSets | None = None,
    settings: EvaluationSettings | None = None,
    options: MergeOptions | None = None,
    relearn: bool = False,
    keep: bool = False,
    problems: Sequence[str] = (),
) -> Frontier:
    """Measure a recipe with other values of its parameters, and write what was found.

    Args:
        source: a recipe's file, its YAML text, or the mapping in it.
        over: values by parameter, the usual ones for an empty list; all are combined with all.
        out: gets table, plot and mask; what was measured there before is not made again.
        sets: what is measured on; the recipe's own sets if not given.
        settings: how it is measured.
        options: mergekit's.
        relearn: learn a mask for each value of a parameter that decides it.
        keep: leave the merges in ``out``.
        problems: what the caller has found wrong, told together with what is found here.

    Raises:
        RecipeError: everything that is wrong, together, before a model is loaded; or the base
            can't be measured, or no mask be learned. Of other points that fail the result tells.
    """
    folder = Path(os.path.abspath(out))
    recipe = read_recipe(source)
    options = options or MergeOptions()
    settings = settings or EvaluationSettings(
        device=options.device or "cpu", trust_remote_code=options.trust_remote_code
    )
    wrong = list(problems)
    if sets is None:
        sets, unread = sets_of(recipe)
        wrong += unread
    ready = prepared(recipe, over, folder, sets, settings, options, relearn=relearn, problems=wrong)
    how = Rendering(recipe_settings(recipe).template_keywords)
    settings = replace(settings, rendering=how)
    sets = sets.limited(settings.limit)

    def say(text: str) -> None:
        if not options.quiet:
            click.echo(f"somf: {text}", err=True)

    axes, failures = axes_of(sets), dict[str, str]()
    in_use = f"another frontier is being made in {folder}: wait for it, or name another folder"
    with locked(folder, in_use), Store(folder / MEASURED_FOLDER) as store:
        masks = _masks(ready, failures)
        making = Making(folder, ready.base, sets, settings, options, keep, say, store)
        entries = _entries(ready, making, masks, failures)
        found = Frontier(
            recipe=recipe_text(recipe),
            swept=ready.swept,
            axes=axes,
            entries=placed(entries, axes),
            failures=failures,
            masks={label: _told_place(mask.path, folder) for label, mask in masks.items()},
            sets=_told(sets),
            settings=settings,
        )
        try:
            write_frontier(found, folder)
        except OSError as error:
            raise RecipeError(f"the frontier can't be written to {folder}: {error}") from error
    return found


def _masks(ready: Prepared, failures: dict[str, str]) -> dict[str, MaskSet]:
    """Return the masks by their labels, learned where they have to be."""
    found = {}
    for wanted in {id(wanted): wanted for wanted in ready.wanted}.values():
        try:
            found[wanted.label] = wanted.masks()
        except LearningInterrupted:
            raise
        except Exception as error:
            failures[f"mask of {wanted.label}"] = first_line(error)
    if not found:
        raise RecipeError(next(iter(failures.values())))
    return found


def _entries(
    ready: Prepared, making: Making, masks: Mapping[str, MaskSet], failures: dict[str, str]
) -> list[Entry]:
    """Return the base and every point that could be made, points that are the same but once."""
    same: dict[str, list[int]] = {}
    usable: dict[int, MaskSet] = {}
    for number, (point, wanted) in enumerate(zip(ready.points, ready.wanted, strict=True)):
        if point.kind != PLAIN and wanted.label not in masks:
            failures[point.label] = f"its mask, {wanted.label}, could not be learned"
            continue
        # A plain fusion leaves out the masks of any.
        usable[number] = masks.get(wanted.label) or next(iter(masks.values()))
        key = making.merge_key(point, ready.plans[number], usable[number])
        same.setdefault(key, []).append(number)
    making.say(f"{len(same)} merges are compared with their aligned base")
    entries = [Entry(BASE, BASE_LABEL, {}, False, None, making.of_base())]
    # In their order, each where it is told with the most values.
    shown = {max(n, key=lambda n: len(ready.points[n].values)): k for k, n in same.items()}
    for number in sorted(shown):
        point, key = ready.points[number], shown[number]
        try:
            found = making.of_point(point, ready.plans[number], usable[number], key)
        except Exception as error:
            failures[point.label] = reason = first_line(error)
            making.say(f"{point.label} failed: {reason}")
            continue
        is_own = any(not ready.points[other].values for other in same[key])
        label = None if point.kind == PLAIN else ready.wanted[number].label
        entries.append(Entry(point.kind, point.label, point.values, is_own, label, found))
    return entries


def _told(sets: EvaluationSets) -> dict[str, tuple[str, int]]:
    used = {HARMFUL: sets.harmful, HARMLESS: sets.harmless, PAIRS: sets.pairs}
    used |= {skill.name: skill.examples for skill in sets.skills}
    return {name: (sets.told.get(name, ""), len(rows)) for name, rows in used.items() if rows}


def _told_place(path: str, folder: Path) -> str:
    """Return where a mask is, as seen from the frontier's folder where it is in that."""
    place = Path(os.path.realpath(path))
    real = folder.resolve()
    return str(place.relative_to(real)) if place.is_relative_to(real) else str(place)
