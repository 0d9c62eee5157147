"""What lets learning go on where it was stopped: its newest checkpoints, in a folder of their own.

A checkpoint has the logits, what was computed to compare with, and AdamW's moments. There is no
other state: noise is a function of the seed, and data come in a fixed order.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from safetensors import SafetensorError

from ..common.digests import json_digest
from ..common.errors import RecipeError, first_line
from ..common.files import locked
from ..common.process_group import Processes
from .checkpoint_file import Progress, read_checkpoint, recorded_fingerprint, write_checkpoint
from .looks import choice
from .stopping import LearningInterrupted, StopRequests
from .tensors import MaskedTensor

GENERATIONS = 2
_NAME = re.compile(r"^step-(\d+)-([0-9a-f]+)\.safetensors$")
# At the end too, where more than this would be lost if the mask could not be written.
_END_SECONDS = 60
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


@contextlib.contextmanager
def learning_folder(mask_folder: str, process_group: Processes) -> Iterator[str]:
    """Give the folder for the checkpoints of a mask, locked; it goes when nothing is left in it.

    Args:
        mask_folder: where the mask goes; the checkpoints go beside it.
        process_group: this process among those that learn, of which the first holds the lock.

    Raises:
        RecipeError: another training run has the folder, or it can't be written.
    """
    place = checkpoint_folder(mask_folder)
    in_use = f"another process is learning into {mask_folder}: wait for it, or name another place"
    with contextlib.ExitStack() as lock:

        def hold() -> None:
            try:
                lock.enter_context(locked(place, in_use))
                for name in os.listdir(place):
                    # A process that was killed leaves what it had not finished.
                    if name.endswith(".partial"):
                        os.unlink(os.path.join(place, name))
            except OSError as error:
                raise RecipeError(
                    f"checkpoints can't be written to {place}: {error.strerror}"
                ) from error

        process_group.first_does(hold)
        yield place


def checkpoint_folder(mask_folder: str) -> str:
    """Return where the checkpoints of a mask go that is learned into ``mask_folder``."""
    return f"{mask_folder}.learning"


def newest_fingerprint(folder: str) -> Any:
    """Return the fingerprint in the newest checkpoint in a folder, None where none can be read."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names if _NAME.match(name)]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(*_UNREADABLE):
            return recorded_fingerprint(path)
    return None


class Checkpoints:
    """The checkpoints of one training run, of which the newest two stay.

    The mask that looks keep is a checkpoint too, and stays as long as one of those needs it.

    One is complete once it has its name: it is written under another, and synced to the disk. Its
    checksum shows whether it was damaged since.

    Attributes:
        stop: whether someone wants this process to end; it does after a step.
    """

    def __init__(
        self,
        folder: str,
        fingerprint: Mapping[str, Any],
        tensors: Sequence[MaskedTensor],
        process_group: Processes,
        *,
        seconds: float,
    ):
        """Use a folder that is there.

        Args:
            folder: with earlier checkpoints or none.
            fingerprint: of what decides the mask.
            tensors: whose logits are stored.
            process_group: this process among those that learn.
            seconds: between two checkpoints.
        """
        self.stop = StopRequests()
        self._folder, self._fingerprint = folder, dict(fingerprint)
        self._key = json_digest(self._fingerprint)[:12]
        # Those that were read or written here, each with that of the mask it keeps; the others are
        # removed.
        self._good: dict[str, str] = {}
        self._tensors, self._process_group = tensors, process_group
        self._seconds = seconds
        self._written = time.monotonic()

    def latest(self) -> Progress:
        """Return how far learning had come, and set the logits to what they were then.

        The first process names the files, the newest first, and all go on from the same one. A
        damaged one is passed over, and what does not count is reported on stderr.

        Raises:
            RecipeError: a process can't open a file: what is in it may be hours of learning.
        """
        found = self._process_group.of_first(self._found())
        own = [path for _, key, path in found if key == self._key]
        if len(own) < len(found):
            self._say(
                f"somf: {len(found) - len(own)} checkpoints in {self._folder} are of another "
                "recipe: they are removed when the first one of this recipe is written"
            )
        for path in reversed(own):
            progress, problem = self._tried(path)
            kept = self._kept(progress) or path
            if problem is None and kept != path:
                problem = self._tried(kept)[1] if kept in own else "it is missing"
                problem = problem and f"it needs {kept}: {problem}"
                if problem is None:
                    # The logits are to be its own again.
                    progress, problem = self._tried(path)
            if problem is None:
                self._good = {path: kept}
                return progress
            self._say(f"somf: checkpoint {path} is passed over: {problem}")
        if own:
            self._say("somf: no checkpoint can be used: learning begins anew")
        for tensor in self._tensors:
            tensor.restart()
        return Progress()

    def after_step(self, progress: Progress, *, is_last: bool) -> None:
        """Write a checkpoint where it is time for one, or where learning is to come back to it.

        Args:
            progress: how far learning has come.
            is_last: whether no step follows.

        Raises:
            LearningInterrupted: the processes are to end; what is done is stored.
            RecipeError: the checkpoint can't be written; the last one is as it was.
        """
        wait = min(self._seconds, _END_SECONDS) if is_last else self._seconds
        due = time.monotonic() - self._written >= wait
        is_kept = self._kept(progress) == self._path(progress.step) and not is_last
        states = self._process_group.gathered([(self.stop.signal, due)])
        stopped = next((signal for signal, _ in states if signal), None)
        # The first one's clock counts: all must write at once.
        if not (states[0][1] or stopped or is_kept):
            return
        self._write(progress)
        self._written = time.monotonic()
        if stopped:
            raise LearningInterrupted(stopped, progress.step)

    def go_back(self, step: int) -> None:
        """Set the logits to those after an earlier step, at which the kept mask was looked at.

        Raises:
            RecipeError: its checkpoint can't be read.
        """
        path = self._path(step)
        _, problem = self._tried(path)
        if problem is not None:
            raise RecipeError(
                f"the mask of step {step}, which is the one to be written, can't be read from "
                f"{path}: {problem}. Give the same command again to go on from "
                "what can be read."
            )

    def remove(self) -> None:
        """Remove all checkpoints, those of other recipes too: learning has come to an end."""
        self._good = {}
        self._prune()

    def _write(self, progress: Progress) -> None:
        unmasked = {row: own.cpu() for row, own in progress.unmasked.items()}
        whole = Progress(
            progress.step,
            progress.history,
            self._of_all(progress.reference),
            self._of_all(unmasked),
        )
        if not self._process_group.is_first:
            # Each has rows of what the first one writes.
            for tensor in self._tensors:
                for name in tensor.state:
                    tensor.whole(name)
            self._process_group.wait()
            return
        path = self._path(progress.step)
        try:
            write_checkpoint(path, self._fingerprint, whole, self._tensors)
        except OSError as error:
            raise RecipeError(
                f"a checkpoint can't be written to {self._folder}: {error.strerror}. The last one "
                "is as it was: make room and give the same command again to go on; another place, "
                "named with --work-dir (SOMF_WORK_DIR), starts anew."
            ) from error
        self._good.pop(path, None)
        self._good[path] = self._kept(progress) or path
        self._good = dict(list(self._good.items())[-GENERATIONS:])
        self._prune()
        self._process_group.wait()

    def _of_all(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """Return what all processes know of rows, in the rows' order."""
        gathered = self._process_group.gathered([list(values.items())])
        return dict(sorted((item for own in gathered for item in own), key=lambda item: item[0]))

    def _prune(self) -> None:
        """Remove all but the good ones and those that they need."""
        needed = {*self._good, *self._good.values()}
        for _, _, path in self._found() if self._process_group.is_first else ():
            if path not in needed:
                # One that can't be removed takes room, and is passed over.
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _path(self, step: int) -> str:
        return os.path.join(self._folder, f"step-{step}-{self._key}.safetensors")

    def _kept(self, progress: Progress) -> str | None:
        """Return where the mask is that the looks so far keep, None where they keep none."""
        step = choice(progress.history).step
        return self._path(step) if step else None

    def _tried(self, path: str) -> tuple[Progress, str | None]:
        """Return what a checkpoint holds, and what is wrong with it in some process.

        Raises:
            RecipeError: this or another process can't open it.
        """
        closed = problem = None
        progress = Progress()
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            closed = f"{error.strerror} (process {self._process_group.rank})"
        reason = self._first_of_all(closed)
        if reason:
            raise RecipeError(
                f"checkpoint {path} can't be read: {reason}. Make it readable, for every "
                "process that learns, and give the same command again to go on; remove it to go "
                "on from the one before, or to begin anew."
            )
        try:
            progress = read_checkpoint(path, self._fingerprint, self._tensors)
        except _UNREADABLE as error:
            problem = first_line(error) or type(error).__name__
        return progress, self._first_of_all(problem)

    def _say(self, text: str) -> None:
        if self._process_group.is_first:
            click.echo(text, err=True)

    def _first_of_all(self, problem: str | None) -> str | None:
        return next(filter(None, self._process_group.gathered([problem])), None)

    def _found(self) -> list[tuple[int, str, str]]:
        """Return steps, recipes' keys and paths of all checkpoints, the oldest first."""
        matches = filter(None, map(_NAME.match, os.listdir(self._folder)))
        return sorted((int(m[1]), m[2], os.path.join(self._folder, m[0])) for m in matches)
