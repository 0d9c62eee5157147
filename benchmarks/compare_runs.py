"""One model of the comparison: made, measured and recorded, each once."""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from somf_mergekit.evaluate import EvaluationSets, EvaluationSettings, NamedModel, evaluated
from somf_mergekit.evaluate.store import digest
from somf_mergekit.preferences import Pair

from .compare_costs import circumstances_now, timed
from .compare_models import FINE_TUNING, OF_A_SEED, SHARED, Models
from .compare_recipes import Making
from .compare_rows import Row
from .compare_splits import SKILLS
from .compare_store import claimed, read_json, removed, write_json

LOSS = "_loss"
MEASURES = {
    "refusals": ("harmful", "refusals (phrases)"),
    "over_refusals": ("harmless", "refusals (phrases)"),
    "preference_accuracy": ("pairs", "preference accuracy"),
    "preference_margin": ("pairs", "preference margin"),
    **{skill + LOSS: (skill, "loss") for skill in SKILLS},
    "repeated": ("harmful", "repeated 4-grams"),
}
# What is still to be done of a run: what it is, told apart from all others, and of which kind.
Missing = dict[tuple[str, ...], str]


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        models: that are merged.
        pairs: to learn from.
        sets: to measure on, by split.
        measuring: how; losses in float32, for a hundredth of what a skill gains is less than the
            rounding of weights to 16 bits moves them.
    """

    models: Models
    pairs: list[Pair]
    sets: dict[str, EvaluationSets]
    measuring: EvaluationSettings

    def parts(self, split: str) -> list[tuple[EvaluationSets, EvaluationSettings]]:
        """Return what is measured on a split, each part with its settings."""
        sets = self.sets[split]
        precise = replace(self.measuring, dtype="float32")
        return [
            (replace(sets, skills=()), self.measuring),
            (EvaluationSets(skills=sets.skills), precise),
        ]

    @cached_property
    def split_keys(self) -> dict[str, str]:
        """What decides the measures of a model, by split."""
        settings = asdict(self.measuring)
        return {name: digest([s.digest, settings]) for name, s in self.sets.items()}


@dataclass(frozen=True)
class Run:
    """A setting of a row under a seed, in a folder named by a digest of how it comes about."""

    bench: Bench
    row: Row
    setting: str
    seed: int

    @property
    def making(self) -> Making:
        """How the model comes about."""
        return self.row.settings[self.setting]

    @property
    def place(self) -> Path:
        """The folder of the seed, or that of what seeds do not change."""
        return self.bench.models.work / ("shared" if self.row.is_shared else f"seed-{self.seed}")

    @property
    def name(self) -> str:
        """A readable name of the run within its seed."""
        setting = self.setting.replace(" ", "-").replace(",", "")
        return f"{self.row.name}-{setting}"

    @cached_property
    def folder(self) -> Path:
        """The folder of the record and, while it is needed, of the model."""
        return self.place / "runs" / f"{self.name}-{self.key}"

    @cached_property
    def key(self) -> str:
        """A digest of how the model comes about."""
        return digest(asdict(self.making))[:12]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of the run."""
        return read_json(self.folder / "run.json")

    def measures(self, split: str) -> dict[str, float] | None:
        """Return what was measured on a split, None where it was not, or not on these examples."""
        found = self.record.get("measures", {}).get(split, {})
        if found.get("key") != self.bench.split_keys[split]:
            return None
        return dict(found["values"])

    def claimed(self) -> AbstractContextManager[bool]:
        """Claim the run for this process, see ``compare_store.claimed``."""
        return claimed(self.folder / ".lock")

    def cost(self) -> dict[str, float] | None:
        """Return the seconds of learning and merging and the peak memory of both.

        None for a prepared model, or where the training that the method needs was not timed here.
        """
        return self.record.get("cost")

    def _cost(self, made: dict[str, Any]) -> dict[str, float] | None:
        making = self.making
        parts = [made]
        if making.learns and not making.reuses:
            parts.append(read_json(self._mask_record))
        parts += [self.bench.models.cost(name, self.seed) for name in making.trained]
        if not all(parts):
            return None
        return {
            "seconds": sum(part["seconds"] for part in parts),
            "peak_bytes": max(part["peak_bytes"] for part in parts),
        }

    def missing(self, split: str) -> Missing:
        """Return what is to be done until the run is measured on a split."""
        if self.measures(split) is not None:
            return {}
        found: Missing = {("measure", str(self.folder), split): f"measuring on {split}"}
        for name in self._needs():
            if not self.bench.models.is_there(name, self.seed):
                place = "" if name in SHARED else str(self.seed)
                found[("model", place, name)] = FINE_TUNING
        if self._model != self._own_model or self._own_model.exists():
            return found
        found[("make", str(self.folder))] = self._kind
        if self.making.learns and not self._mask_record.exists():
            found[("mask", str(self._mask_folder))] = self._mask_kind
        return found

    def measure(self, split: str) -> None:
        """Measure the model on a split, and make it before where it is not there."""
        model = self.made()
        start = time.perf_counter()
        values = {}
        for sets, measuring in self.bench.parts(split):
            evaluation = evaluated(
                [NamedModel(self.name, str(model))],
                sets,
                measuring,
                self.folder / "measured",
                quiet=True,
            )
            values |= {
                name: evaluation.row(*place).estimates[self.name].value
                for name, place in MEASURES.items()
                if name.endswith(LOSS) == bool(sets.skills)
            }
        record = self.record
        record.setdefault("measures", {})[split] = {
            "key": self.bench.split_keys[split],
            "values": values,
            "wall": time.perf_counter() - start,
            "kind": f"measuring on {split}",
            **circumstances_now(),
        }
        self._write(record)

    def drop_model(self) -> None:
        """Remove the model; mask and record stay, and the model can be made again."""
        removed(self._own_model)

    @property
    def _own_model(self) -> Path:
        return self.folder / "model"

    @property
    def _model(self) -> Path:
        if self.making.model:
            return self.bench.models.folder(self.making.model, self.seed)
        return self._own_model

    @cached_property
    def _mask_folder(self) -> Path:
        return self.place / "masks" / digest(self.making.learns)[:12]

    @property
    def _mask_record(self) -> Path:
        return self._mask_folder / "made.json"

    @property
    def _kind(self) -> str:
        making = self.making
        if making.dpo:
            return "DPO"
        return f"merging by {making.merges[-1]['merge_method']}"

    @property
    def _mask_kind(self) -> str:
        parameters = self.making.learns["parameters"] if self.making.learns else {}
        if parameters.get("max_steps") == 0:
            return "an untrained mask"
        fusion = parameters.get("fusion", "task_arithmetic")
        utility = " with a utility term" if "utility_dataset" in parameters else ""
        return f"a mask for {fusion}{utility}"

    def _needs(self) -> list[str]:
        """The prepared models that making the run takes."""
        making = self.making
        text = str(asdict(making))
        named = [name for name in (*SHARED, *OF_A_SEED) if f"'@{name}'" in text]
        return [making.model] if making.model else named

    def made(self) -> Path:
        """Return the folder of the model, which is made where it is not there."""
        models, needs = self.bench.models, self._needs()
        for name in needs:
            models.made(name, self.seed, self.bench.pairs)
        record = self.record
        # Specialists that another machine made again may differ in the last bits.
        record["inputs"] = {name: models.digest(name, self.seed) for name in needs}
        self._write(record)
        if self.making.model or self._own_model.exists():
            return self._model
        names = models.names(self.seed)
        if self.making.learns:
            self._learn(names)
            names["mask"] = str(self._mask_folder / "mask")
        task = {"what": "merge", "recipes": list(self.making.merges), "dpo": self.making.dpo}
        task |= {"names": names, "folder": str(self._own_model), "seed": self.seed}
        made = timed(task, self._kind)
        # Made again, the model is the same; what it took the first time counts.
        if "made" not in record:
            record |= {"made": made, "cost": self._cost(made)}
        self._write(record)
        return self._model

    def _learn(self, names: dict[str, str]) -> None:
        folder = self._mask_folder
        with claimed(folder.with_name(f"{folder.name}.lock"), wait=True):
            if self._mask_record.exists():
                return
            # What an interruption left would be used again, and seem to have taken no time.
            removed(folder)
            folder.mkdir(parents=True)
            task = {"what": "learn", "recipe": self.making.learns, "folder": str(folder / "mask")}
            write_json(self._mask_record, timed({**task, "names": names}, self._mask_kind))

    def restore(self, record: dict[str, Any]) -> None:
        """Take a record of the same making that was written elsewhere."""
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        told = {
            "row": self.row.name,
            "setting": self.setting,
            "seed": None if self.row.is_shared else self.seed,
            "making": asdict(self.making),
            "key": self.key,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", told | record)
