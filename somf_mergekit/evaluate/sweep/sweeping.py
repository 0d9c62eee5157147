"""A sweep from its first check to its files."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.options import MergeOptions

from ...common.errors import RecipeError, first_line
from ...common.files import locked
from ...common.requirements import versions
from ...learner.stopping import LearningInterrupted
from ...recipe.blocks import recipe_text
from ...recipe.validate import read_recipe
from ..evaluation import BY_PHRASES
from ..evaluation_settings import EvaluationSettings
from ..phrase_judges import PHRASES_ERROR
from ..store import ANSWERS, Store
from .making import Making
from .scoring import TEST, VALIDATION, Axes, Score, placed
from .sweep_file import Sources
from .sweep_plan import PlannedSweep, planned_file, planned_recipe
from .sweep_table import write_record
from .variants import BASE, PLAIN, Variant

LOG = logging.getLogger(__name__)
_MEASURED = "measured"


def sweep(
    source: str | os.PathLike[str] | Mapping[str, Any],
    over: Mapping[str, Sequence[Any]],
    out: str | os.PathLike[str],
    *,
    sources: Sources | None = None,
    settings: EvaluationSettings | None = None,
    options: MergeOptions | None = None,
    relearn: bool = False,
    keep: bool = False,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a recipe with other values of its parameters, or the recipes of a sweep file.

    Args:
        source: the file of a recipe or of a sweep, its YAML text, or the mapping in it.
        over: of a recipe: values by parameter, the usual ones for an empty list; all are combined
            with all. Empty for a sweep file, which has its own.
        out: gets table, plot and masks; what was measured there before isn't made again.
        sources: of what a recipe's variants are measured on; where it names none, the recipe's own.
        settings: how models are measured; what a sweep file says of it comes first.
        options: mergekit's.
        relearn: learn a mask for each value of a parameter that decides it.
        keep: leave the merges in ``out``.
        problems: what the caller has found wrong, reported with what is found here.

    Returns:
        What ``sweep.json`` holds: ``models`` with ``name``, ``label``, ``safety`` (a share),
        ``skill`` (nats a token), ``on_front`` and, a row per seed, ``test`` and ``validation``;
        and ``failures``: reasons by label.

    Raises:
        RecipeError: everything that is wrong, together, before a model is loaded; or the base
            can't be measured. Other failures are listed in the result.
    """
    folder = Path(os.path.abspath(out))
    options = options or MergeOptions()
    settings = settings or EvaluationSettings(
        device=options.device or "cpu", trust_remote_code=options.trust_remote_code
    )
    content, wrong = content_of(source), list(problems)
    if is_sweep_file(content):
        if over:
            wrong.append("--over is for one recipe: write `over:` into the sweep file")
        planned = planned_file(content, folder, settings, options, wrong)
        text = yaml.safe_dump(dict(content), sort_keys=False).rstrip()
    else:
        recipe = read_recipe(content)
        sets, unread = (sources or Sources()).read(recipe)
        wrong += unread
        text = recipe_text(recipe)
        planned = planned_recipe(
            recipe, over, folder, sets, settings, options, relearn=relearn, problems=wrong
        )

    def say(message: str) -> None:
        if not options.quiet:
            click.echo(f"somf: {message}", err=True)

    in_use = f"another sweep is being made in {folder}: wait for it, or name another folder"
    with locked(folder, in_use), Store(folder / _MEASURED) as store:
        work = _Work(planned, Making(planned, store, folder, options, keep, say))
        axes = Axes(planned.sets[TEST])
        try:
            models = work.models()
        finally:
            work.making.clear()
        record = {
            "source": text,
            "safety": axes.safety_text,
            "skill": axes.skill_text,
            "models": placed(models, axes),
            "failures": work.failures,
            "notes": [*planned.notes, *_notes(planned, folder)],
            "packages": versions(),
        }
        try:
            write_record(record, folder)
        except OSError as error:
            raise RecipeError(f"the sweep can't be written to {folder}: {error}") from error
    return record


def content_of(source: Any) -> Any:
    """Return the mapping in a sweep file; a recipe is left as it is, for its own reader."""
    if isinstance(source, Mapping):
        return source
    with contextlib.suppress(OSError, TypeError, UnicodeDecodeError, yaml.YAMLError):
        text = os.fspath(source)
        found = yaml.safe_load(text if "\n" in text else Path(text).read_text(encoding="utf-8"))
        return found if is_sweep_file(found) else source
    return source


def is_sweep_file(content: Any) -> bool:
    """Return whether a mapping lists recipes, and isn't one."""
    return isinstance(content, Mapping) and "recipes" in content and "merge_method" not in content


class _Work:
    """The models of a sweep, made and measured entry by entry."""

    def __init__(self, planned: PlannedSweep, making: Making):
        self.planned = planned
        self.making = making
        self.reference: Score | None = None
        self.failures: dict[str, str] = {}

    def models(self) -> list[dict[str, Any]]:
        """Return the base and every setting that could be measured."""
        base: dict[str, Any] = {"name": BASE, "label": self.planned.base.name, "kind": BASE}
        base["values"] = {}
        for split, sets in self.planned.sets.items():
            measures = self.making.measures(self.planned.base, sets)
            base[split] = [{"seed": None, "measures": measures}]
        entries: dict[str, list[Variant]] = {}
        for variant in self.planned.variants:
            entries.setdefault(variant.entry, []).append(variant)
        self.making.say(f"{len(entries)} entries are compared with their aligned base")
        # What others are held to comes first.
        order = sorted(entries, key=lambda name: name != self.planned.rule.reference)
        found = {name: self._entry(name, entries[name]) for name in order}
        return [base, *(model for name in entries for model in found[name])]

    def _entry(self, name: str, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Return the settings of an entry that could be measured, on test those that are to be."""
        settings: dict[str, list[Variant]] = {}
        for variant in variants:
            settings.setdefault(variant.label, []).append(variant)
        validated: dict[str, list[dict[str, Any]]] = {}
        choice: tuple[str, bool] | None = None
        is_reference = name == self.planned.rule.reference
        if VALIDATION in self.planned.sets and (len(settings) > 1 or is_reference):
            validated = self._validated(settings)
            choice = self._choice(validated, next(iter(settings)) if is_reference else None)
        found = []
        for label, of_seeds in settings.items():
            first = of_seeds[0]
            is_tested = choice is None or first.test_all or label == choice[0]
            runs = self._runs(of_seeds, TEST) if is_tested else []
            model: dict[str, Any] = {"name": name, "label": label, "kind": first.kind}
            model["values"] = {**first.values}
            if first.mask and first.kind != PLAIN:
                model["mask"] = self.planned.masks[first.mask].label
            if choice:
                model |= {"chosen": label == choice[0], "qualifies": choice[1]}
            if runs or label in validated:
                found.append(model | {TEST: runs, VALIDATION: validated.get(label, [])})
        # They are here until all that asks for them is measured.
        self.making.clear()
        return found

    def _validated(self, settings: Mapping[str, list[Variant]]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of each setting that could be measured with all seeds that tune."""
        seeds = [variant.seed for variant in next(iter(settings.values()))]
        seeds = [seed for seed in self.planned.tune_seeds if seed in seeds] or seeds[:1]
        found = {}
        for label, variants in settings.items():
            runs = self._runs([v for v in variants if v.seed in seeds], VALIDATION)
            if len(runs) == len(seeds):
                found[label] = runs
        return found

    def _choice(
        self, validated: Mapping[str, list[dict[str, Any]]], reference: str | None
    ) -> tuple[str, bool]:
        """Return the setting that the rule chooses, empty for none, and whether it qualifies.

        Args:
            validated: rows by setting.
            reference: the setting that this and later entries are held to; None for an earlier one.
        """
        axes = Axes(self.planned.sets[VALIDATION])
        scores = {
            label: axes.score([run["measures"] for run in runs])
            for label, runs in validated.items()
        }
        if reference is not None:
            self.reference = scores.get(reference)
        known = {label: score for label, score in scores.items() if score}
        return self.planned.rule.chosen(known, self.reference) if known else ("", False)

    def _runs(self, variants: Sequence[Variant], split: str) -> list[dict[str, Any]]:
        """Return a row for each seed of a setting that could be made and measured."""
        found = []
        for variant in variants:
            label = variant.label + ("" if variant.seed is None else f" (seed {variant.seed})")
            try:
                row = self.making.measured(variant, self.planned.sets[split])
            except LearningInterrupted:
                raise
            except Exception as error:
                self.failures[label] = first_line(error)
                LOG.debug("%s failed", label, exc_info=error)
                self.making.say(f"{label} failed: {first_line(error)}")
            else:
                found.append({"seed": variant.seed, **row})
            if VALIDATION not in self.planned.sets:
                # Nothing else will ask for it.
                self.making.clear()
        return found


def _notes(planned: PlannedSweep, folder: Path) -> Iterator[str]:
    """Yield under which circumstances models were made and measured, a line each."""
    for mask in {wanted.place: wanted for wanted in planned.masks.values()}.values():
        place, real = Path(os.path.realpath(mask.place)), folder.resolve()
        shown = place.relative_to(real) if place.is_relative_to(real) else place
        yield f"mask of {mask.label}: {shown}"
    for split, sets in planned.sets.items():
        for name, size in sets.sizes.items():
            source = sets.sources.get(name)
            yield f"{split}, {name}: {size} examples" + (f" of {source}" if source else "")
    if any(sets.harmful or sets.harmless for sets in planned.sets.values()):
        yield f"{BY_PHRASES}: {PHRASES_ERROR.text}"
    if VALIDATION in planned.sets:
        yield f"the rule: {planned.rule.text}"
    yield planned.settings.text
    yield f"generated answers: {_MEASURED}/{ANSWERS}, which may hold harmful text"
