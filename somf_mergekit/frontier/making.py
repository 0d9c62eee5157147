"""One point after the other: merged, measured, deleted; what is known is not made again."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from ..contracts import versions
from ..digests import file_digests, json_digest
from ..evaluate.runner import evaluated
from ..evaluate.sets import EvaluationSets
from ..evaluate.settings import EvaluationSettings, NamedModel
from ..evaluate.store import Store
from ..masks import MaskSet
from ..plan import PlannedMerge
from ..planner import write_merge
from ..progress import no_model_bars
from ..provenance import content_of_models, resolved_merge
from ..recipe_blocks import plain, recipe_text
from .axes import found_measures
from .over import FUSION, KIND, TEMPERATURE
from .points import PLAIN, Point, file_name, with_mask

MEASURED_FOLDER, KEPT_FOLDER, WORK_FOLDER = "measured", "merges", "merging"
# Parameters of somf that say how a mask is applied.
_MASKING = (KIND, TEMPERATURE, "mask_rescale", "include", "exclude")
_ELSEWHERE = ("base_model", "models", "slices", "modules", "parameters")


@dataclass
class Making:
    """How the points of a frontier are made and measured.

    Attributes:
        out: the frontier's folder.
        base: the aligned base, to which differences are.
        sets: what is measured on.
        settings: how.
        options: mergekit's.
        keep: whether merges stay.
        say: tells what is done.
        store: of what was measured before.
    """

    out: Path
    base: NamedModel
    sets: EvaluationSets
    settings: EvaluationSettings
    options: MergeOptions
    keep: bool
    say: Callable[[str], None]
    store: Store
    _content: dict[str, Any] = field(default_factory=dict)

    def of_base(self) -> dict[str, dict[str, Any]]:
        """Return what is measured of the aligned base."""
        return self._measured(self.base)

    def merge_key(self, point: Point, planned: PlannedMerge, masks: MaskSet) -> str:
        """Return a key of all that decides a point's weights: equal points have equal ones."""
        if not self._content:
            # The same for all points of a frontier, whose models are the same.
            self._content = content_of_models(planned)
        applied = (FUSION, "seed", *(() if point.kind == PLAIN else _MASKING))
        said = {k: v for k, v in plain(planned.config).items() if k not in _ELSEWHERE}
        mask = None if point.kind == PLAIN else file_digests([masks.path])[0]
        resolved = resolved_merge(planned, applied)
        return json_digest([self._content, said, resolved, mask, versions()])

    def of_point(
        self, point: Point, planned: PlannedMerge, masks: MaskSet, key: str
    ) -> dict[str, dict[str, Any]]:
        """Return what is measured of a point, which is merged now where it has to be.

        Args:
            point: a merge.
            planned: its plan.
            masks: its mask; for a plain fusion any of its recipe.
            key: see ``merge_key``.
        """
        measuring = asdict(self.settings) | {"place": self.settings.place}
        record = json_digest(["frontier", key, self.sets.digest, measuring])
        kept = self.out / KEPT_FOLDER / f"{file_name(point.label)}-{key[:8]}"
        store = self.store
        if store.has_value(record) and (kept.exists() or not self.keep):
            return dict(store.value(record))
        with self._merged(point, planned, masks, kept) as folder:
            if store.has_value(record):
                return dict(store.value(record))
            found = self._measured(NamedModel(point.label, str(folder)))
        store.add_value(record, {"step": f"frontier: {point.label}"}, found)
        return found

    @contextlib.contextmanager
    def _merged(self, point: Point, planned: PlannedMerge, masks: MaskSet, kept: Path) -> Any:
        """Give the folder of a merge, which is there for the time or to stay."""
        if kept.exists():
            yield kept
            return
        work = self.out / WORK_FOLDER
        # What a killed process has left.
        shutil.rmtree(work, ignore_errors=True)
        config = with_mask(point.config, masks.path)
        further = {"quiet": True, "safe_serialization": True}
        options = self.options.model_copy(
            update=further | ({} if self.keep else {"write_model_card": False})
        )
        # Planned before the mask was there, whose place is told with the merge.
        planned = replace(
            planned,
            config=with_mask(planned.config, masks.path),
            recipe=recipe_text(config),
            options=options,
        )
        try:
            self.say(f"merging {point.label}")
            with no_model_bars():
                is_masked = point.kind != PLAIN
                write_merge(config, planned, masks, str(work), options, is_masked=is_masked)
            if self.keep:
                kept.parent.mkdir(exist_ok=True)
                work.rename(kept)
            yield kept if self.keep else work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _measured(self, model: NamedModel) -> dict[str, dict[str, Any]]:
        models = [self.base] if model == self.base else [self.base, model]
        evaluation = evaluated(
            models,
            self.sets,
            self.settings,
            self.store,
            quiet=self.options.quiet,
            distances=False,
        )
        return found_measures(evaluation, model.name)
