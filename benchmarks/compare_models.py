"""The models that are merged: an aligned base for all seeds, specialists of each seed."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click

from somf_mergekit.evaluate.models import content_digest
from somf_mergekit.preferences import Pair

from .compare_costs import timed
from .compare_make import SAFE
from .compare_store import claimed, read_json, write_json
from .real_data import HARMLESS, HELD_OUT, SAFETY_PAIRS, write_sets
from .real_training import (
    ALIGNED,
    SPECIALIST,
    Training,
    make_aligned,
    make_published,
)

SHARED = ("published", "aligned")
OF_A_SEED = ("math", "code", "general", SAFE)
FINE_TUNING = "fine-tuning"
# On safe answers, at the rate that aligned the base, for as many steps as a mask is learned.
SAFETY_TUNED = Training(steps=60, learning_rate=2e-4, seed=1)


@dataclass(frozen=True)
class Trainings:
    """How the models are fine-tuned; a seed is added to each one's own."""

    aligned: Training = ALIGNED
    specialist: Training = SPECIALIST
    safe: Training = SAFETY_TUNED

    def of(self, name: str, seed: int) -> Training:
        """Return how the model ``name`` of a seed is fine-tuned."""
        training = self.safe if name == SAFE else self.specialist
        return replace(training, seed=training.seed + seed)


QUICK = Trainings(
    aligned=replace(ALIGNED, steps=2),
    specialist=replace(SPECIALIST, steps=2),
    safe=replace(SAFETY_TUNED, steps=2),
)


@dataclass(frozen=True)
class Models:
    """Where the models are, and how those that are not there are made.

    Attributes:
        work: folder of the whole comparison.
        data: of the sets, None for the hub.
        source: hub id or folder of the published model.
        trainings: of the others.
    """

    work: Path
    data: Path | None
    source: str
    trainings: Trainings

    def folder(self, name: str, seed: int) -> Path:
        """Return where the model ``name`` is for a seed."""
        return (self.work if name in SHARED else self.work / f"seed-{seed}") / "models" / name

    def names(self, seed: int) -> dict[str, str]:
        """Return the paths that stand for the @names in recipes."""
        paths = {name: str(self.folder(name, seed)) for name in (*SHARED, *OF_A_SEED)}
        sets = {"pairs": self.work / SAFETY_PAIRS, "utility": self.work / HARMLESS}
        return paths | {name: str(path) for name, path in sets.items()}

    def write_sets(self) -> tuple[list[Pair], list[Pair]]:
        """Write what is learned from, and return pairs to learn from and held-out ones.

        Raises:
            click.ClickException: the work folder saw other data, or another published model.
        """
        with tempfile.TemporaryDirectory(dir=self.work) as incoming:
            found = write_sets(Path(incoming), self.data)
            self._take_sets(Path(incoming))
        published = self.folder("published", 0)
        if published.exists():
            # It is there: all that happens is that another source is refused.
            make_published(published, self.source)
        return found

    def _take_sets(self, incoming: Path) -> None:
        now, earlier = _digests(incoming), _digests(self.work)
        differing = [name for name, value in earlier.items() if now[name] != value]
        if differing:
            raise click.ClickException(
                f"{self.work}: the models there were made with other data than is given now "
                f"({', '.join(differing)}): give the same --data, or another folder"
            )
        for name in now:
            os.replace(incoming / name, self.work / name)

    def is_there(self, name: str, seed: int) -> bool:
        """Return whether a model is made."""
        return (self.folder(name, seed) / "config.json").exists()

    def made(self, name: str, seed: int, pairs: Sequence[Pair]) -> Path:
        """Return the folder of a model, which is made where it must be."""
        folder = self.folder(name, seed)
        with claimed(folder.with_name(f"{name}.lock"), wait=True):
            return self._made(folder, name, seed, pairs)

    def _made(self, folder: Path, name: str, seed: int, pairs: Sequence[Pair]) -> Path:
        if self.is_there(name, seed):
            self._check(folder, name, seed)
            return folder
        if name in SHARED:
            self._make_shared(name, pairs)
            return folder
        training = self.training(name, seed)
        task = {"what": "finetune", "name": name, "folder": str(folder), "training": training}
        task |= {"names": self.names(seed), "data": self.data and str(self.data)}
        write_json(_cost_file(folder), timed(task, FINE_TUNING))
        return folder

    def digest(self, name: str, seed: int) -> str:
        """Return a digest of a model's content, computed once for what is there."""
        folder = self.folder(name, seed).resolve()
        changed = max(file.stat().st_mtime_ns for file in folder.iterdir())
        return _content_digest(folder, changed)

    def cost(self, name: str, seed: int) -> dict[str, Any]:
        """Return what a model's training took, {} where it was made elsewhere."""
        return read_json(_cost_file(self.folder(name, seed)))

    def training(self, name: str, seed: int) -> dict[str, Any]:
        """Return how a model is made: from what, or how it is fine-tuned."""
        if name == "published":
            return {"source": Path(self.source).name}
        of_it = self.trainings.aligned if name == "aligned" else self.trainings.of(name, seed)
        return asdict(of_it)

    def _check(self, folder: Path, name: str, seed: int) -> None:
        """Check that a model is what it would be made as.

        Raises:
            click.ClickException: it was fine-tuned otherwise.
        """
        if name == "published":
            return
        expected, told = self.training(name, seed), read_json(folder / "training.json")
        if {key: told.get(key) for key in expected} != expected:
            raise click.ClickException(
                f"{folder} was made with other settings (see training.json in it): remove it, or "
                "name another folder"
            )

    def _make_shared(self, name: str, pairs: Sequence[Pair]) -> None:
        if name == "published":
            make_published(self.folder(name, 0), self.source)
        else:
            published = self.made("published", 0, pairs)
            make_aligned(
                self.folder(name, 0), published, list(pairs), self.data, self.trainings.aligned
            )


@lru_cache
def _content_digest(folder: Path, changed: int) -> str:
    return content_digest(folder)[:12]


def _digests(folder: Path) -> dict[str, str]:
    """Return the digests of the sets in a folder, those that are there."""
    files = {name: folder / name for name in (SAFETY_PAIRS, HELD_OUT, HARMLESS)}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if file.exists()
    }


def _cost_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".cost.json")
