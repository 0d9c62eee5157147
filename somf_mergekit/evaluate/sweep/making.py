"""One model after the other: made, measured, deleted; what is known isn't made again."""

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mergekit.merge
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ...common.console import no_model_bars
from ...common.digests import file_digests, json_digest
from ...common.errors import RecipeError, first_line
from ...common.requirements import versions
from ...learner.stopping import LearningInterrupted
from ...mask.artifact import MaskSet
from ...plugin.merge_check import planned_merge
from ...plugin.planner import write_merge
from ...prepass.weight_files import content_fingerprint
from ...recipe.blocks import plain
from ..evaluation_sets import EvaluationSets
from ..evaluation_settings import NamedModel
from ..measured_models import content_digest
from ..runner import evaluated
from ..store import Store
from .scoring import measures_of
from .sweep_file import MERGED, OUT, any_recipe, filled
from .sweep_plan import WORK, PlannedSweep
from .variants import MASK, PLAIN, Variant, file_name, with_values

# What of a model's folder a merge takes beside the weights.
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass
class Making:
    """How the models of a sweep are made and measured.

    Attributes:
        planned: the sweep.
        store: of what is measured.
        out: its folder.
        options: mergekit's.
        keep: whether merges stay.
        say: reports what is done.
    """

    planned: PlannedSweep
    store: Store
    out: Path
    options: MergeOptions
    keep: bool
    say: Callable[[str], None]
    _contents: dict[ModelReference, Any] = field(default_factory=dict)
    _masks: dict[str, MaskSet | Exception] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

    def measures(self, model: NamedModel, sets: EvaluationSets) -> dict[str, Any]:
        """Return what is measured of a model that is there, see ``scoring.measures_of``."""
        evaluation = evaluated(
            list(dict.fromkeys([self.planned.base, model])),
            sets,
            self.planned.settings,
            self.store,
            quiet=self.options.quiet,
            distances=False,
        )
        return measures_of(evaluation, model.name)

    def measured(self, variant: Variant, sets: EvaluationSets) -> dict[str, Any]:
        """Return what is measured of a model, which is made now where it has to be.

        Returns:
            ``measures``, see ``scoring.measures_of``, and ``seconds`` of learning and merging.

        Raises:
            RecipeError: it can't be made or measured.
        """
        if variant.model:
            return {"measures": self.measures(NamedModel(variant.label, variant.model), sets)}
        of_model = self._key(variant)
        settings = self.planned.settings
        measuring = asdict(settings) | {"place": settings.place}
        key = json_digest([of_model, sets.digest, measuring])[:32]
        name = f"{file_name(variant.label)}-{of_model[:8]}"
        place = self.out / ("merges" if self.keep else WORK) / name
        if not place.exists() and (self.keep or key not in self.store.values):
            self._make(variant, of_model, place)
        if key not in self.store.values:
            model = NamedModel(variant.label, str(place))
            found: dict[str, Any] = {"measures": self.measures(model, sets)}
            if of_model in self._seconds:
                found["seconds"] = self._seconds[of_model]
            self.store.add_value(key, {"step": f"{variant.label}: all measures"}, found)
        return dict(self.store.values[key])

    def clear(self) -> None:
        """Delete the models that don't stay."""
        shutil.rmtree(self.out / WORK, ignore_errors=True)

    def _key(self, variant: Variant) -> str:
        """Return a key of all that decides a model's weights."""
        mask = None
        if variant.takes_mask and variant.kind != PLAIN:
            mask = file_digests([self._mask(variant).path])[0]
            without = with_values(variant.recipes[0], {MASK: ""})
            variant = replace(variant, recipes=(without, *variant.recipes[1:]))
        LoaderCache().setup(options=self.options)
        for recipe in variant.recipes:
            for model in recipe.referenced_models():
                if str(model) != MERGED and model not in self._contents:
                    folder = Path(LoaderCache().get(model).index.base_path)
                    texts = content_digest(folder, _TEXTS)
                    self._contents[model] = [content_fingerprint(model), texts]
        recipes = [
            [plain(r), [self._contents.get(m) for m in sorted(r.referenced_models(), key=str)]]
            for r in variant.recipes
        ]
        draws = [variant.seed, self.options.random_seed, variant.kind == PLAIN]
        return json_digest([recipes, mask, variant.command, draws, versions()])

    def _mask(self, variant: Variant) -> MaskSet:
        wanted = self.planned.masks[variant.mask]
        if wanted.place not in self._masks:
            try:
                self._masks[wanted.place] = wanted.masks()
            except LearningInterrupted:
                raise
            except Exception as error:
                # Not tried again for each of its merges.
                self._masks[wanted.place] = error
        found = self._masks[wanted.place]
        if isinstance(found, Exception):
            reason = first_line(found)
            raise RecipeError(f"the mask of {wanted.label} can't be learned: {reason}") from found
        return found

    def _make(self, variant: Variant, key: str, place: Path) -> None:
        """Make a model in the folder ``place``."""
        self.say(f"merging {variant.label}")
        changed: dict[str, Any] = {"quiet": True, "safe_serialization": True}
        changed |= {} if self.keep else {"write_model_card": False}
        changed |= {} if variant.seed is None else {"random_seed": variant.seed}
        options = self.options.model_copy(update=changed)
        masks = self._mask(variant) if variant.takes_mask else None
        last = partial = self.out / WORK / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.perf_counter()
        try:
            with no_model_bars():
                for number, recipe in enumerate(variant.recipes):
                    given = None if number else masks
                    config = any_recipe(filled(plain(recipe), {MERGED: last})) if number else recipe
                    last = partial / str(number)
                    _write(config, given, last, options, is_masked=variant.kind != PLAIN)
            if variant.command:
                last = _commanded(variant.command, last, partial / "commanded")
            seconds = time.perf_counter() - start
            if masks and variant.kind != PLAIN:
                seconds += self.planned.masks[variant.mask].seconds()
            self._seconds[key] = seconds
            place.parent.mkdir(exist_ok=True)
            last.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(
    recipe: MergeConfiguration,
    masks: MaskSet | None,
    folder: Path,
    options: MergeOptions,
    *,
    is_masked: bool,
) -> None:
    """Write the merge of a recipe, one of somf with its masks or as if it had none."""
    if masks is None:
        mergekit.merge.run_merge(recipe.model_copy(deep=True), str(folder), options)
        return
    recipe = with_values(recipe, {MASK: masks.path})
    planned = planned_merge(recipe, options)
    write_merge(recipe, planned, masks, str(folder), options, is_masked=is_masked)


def _commanded(command: str, model: Path, out: Path) -> Path:
    """Run a command that makes a model from another one, and return its folder.

    Raises:
        RecipeError: it fails, or makes no model.
    """
    words = [filled(word, {MERGED: model, OUT: out}) for word in shlex.split(command)]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RecipeError(f"the command {words[0]} failed: {first_line(error)}") from error
    if not (out / "config.json").exists():
        raise RecipeError(f"the command {words[0]} wrote no model to {OUT}")
    return out
