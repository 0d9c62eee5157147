"""What lets learning go on where it was stopped: the logits and what was computed to compare with.

With them goes what the optimiser keeps of earlier steps. There is no other state: noise is a
function of the seed, and data come in a fixed order.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import click
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.digests import json_digest
from ..common.errors import RecipeError, first_line
from ..common.process_group import Processes
from .interruption import LearningInterrupted, StopRequests
from .safetensors_file import StoredTensor, tensor_bytes, write_safetensors
from .tensors import MaskedTensor

FORMAT = "somf-checkpoint/2"
GENERATIONS = 2
_NAME = re.compile(r"^step-(\d+)-([0-9a-f]+)\.safetensors$")
# At the end too, where more than this would be lost if the mask could not be written.
_END_SECONDS = 60
_HEADER_KEY = "somf"
_PAIRS, _RATIOS = "reference rows", "reference"
_TOKENS, _LENGTHS, _UNMASKED = "utility rows", "utility lengths", "utility"
_KEPT = (_PAIRS, _RATIOS, _TOKENS, _LENGTHS, _UNMASKED)
# The last tensor of the file: a checksum over the header and all others.
_CHECKSUM = "checksum"


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


@dataclass
class Progress:
    """How far learning has come, but for the logits.

    Attributes:
        step: steps that are done.
        history: a row per step.
        reference: log-probabilities of each pair's answers under the reference, by its number.
        unmasked: of each utility answer's tokens under the unmasked merge, by its number.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[int, tuple[float, float]] = field(default_factory=dict)
    unmasked: dict[int, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one learning, the newest two, in a folder of their own.

    One is complete once it has its name: it is written under another, and synced to the disk. Its
    checksum tells one that was damaged since.

    Attributes:
        stop: whether someone wants this process to end; it does after a step.
    """

    def __init__(
        self,
        folder: str,
        fingerprint: Mapping[str, Any],
        tensors: Sequence[MaskedTensor],
        together: Processes,
        *,
        seconds: float,
    ):
        """Take a folder that is there.

        Args:
            folder: with earlier checkpoints or none.
            fingerprint: of what decides the mask.
            tensors: whose logits are kept.
            together: this process among those that learn.
            seconds: between two checkpoints.
        """
        self.stop = StopRequests()
        self._folder, self._fingerprint = folder, dict(fingerprint)
        self._key = json_digest(self._fingerprint)[:12]
        # Those that were read or written here; only these are worth keeping.
        self._good: list[str] = []
        self._tensors, self._together = tensors, together
        self._seconds = seconds
        self._written = time.monotonic()

    def latest(self, say: Callable[[str], object] = _to_stderr) -> Progress:
        """Return how far learning had come, and set the logits to what they were then.

        The first process names the files, the newest first, and all go on from the same one. A
        damaged one is passed over.

        Args:
            say: takes what the user should know of checkpoints that do not count.

        Raises:
            RecipeError: a process can't open a file: what is in it may be hours of learning.
        """
        say = say if self._together.is_first else _say_nothing
        found = self._together.of_first(self._found())
        own = [path for _, key, path in found if key == self._key]
        if len(own) < len(found):
            say(
                f"somf: {len(found) - len(own)} checkpoints in {self._folder} are of another "
                "recipe: they are removed when the first one of this recipe is written"
            )
        for path in reversed(own):
            progress, problem = self._tried(path)
            problems = [told for told in self._together.gathered([problem]) if told]
            if not problems:
                self._good = [path]
                return progress
            say(f"somf: checkpoint {path} is passed over: {problems[0]}")
        if own:
            say("somf: no checkpoint can be used: learning begins anew")
        for tensor in self._tensors:
            tensor.restart()
        return Progress()

    def after_step(self, progress: Progress, *, is_last: bool) -> None:
        """Write a checkpoint where it is time for one.

        Args:
            progress: how far learning has come.
            is_last: whether no step follows.

        Raises:
            LearningInterrupted: the processes are to end; what is done is kept.
            RecipeError: the checkpoint can't be written; the last one is as it was.
        """
        wait = min(self._seconds, _END_SECONDS) if is_last else self._seconds
        due = time.monotonic() - self._written >= wait
        told = self._together.gathered([(self.stop.signal, due)])
        stopped = next((signal for signal, _ in told if signal), None)
        # The first one's clock counts: all must write together.
        if not (told[0][1] or stopped):
            return
        self._write(progress)
        self._written = time.monotonic()
        if stopped:
            raise LearningInterrupted(stopped, progress.step)

    def remove(self) -> None:
        """Remove all checkpoints, those of other recipes too: learning has come to an end."""
        self._good = []
        self._prune()

    def _write(self, progress: Progress) -> None:
        pairs = self._of_all(progress.reference)
        utility = self._of_all({row: of.cpu() for row, of in progress.unmasked.items()})
        tokens = list(utility.values())
        kept = {
            _PAIRS: torch.tensor(list(pairs), dtype=torch.int64),
            _RATIOS: torch.tensor(list(pairs.values()), dtype=torch.float64).reshape(-1, 2),
            _TOKENS: torch.tensor(list(utility), dtype=torch.int64),
            _LENGTHS: torch.tensor(list(map(len, tokens)), dtype=torch.int64),
            _UNMASKED: torch.cat([torch.empty(0), *tokens]),
        }
        content = [StoredTensor.of(name, kept[name]) for name in _KEPT]
        content += [
            StoredTensor(f"{name}/{t.name}", t.layout.shape, torch.float32, partial(t.whole, name))
            for t in self._tensors
            for name in t.state
        ]
        if not self._together.is_first:
            # Each has rows of what the first one writes.
            for tensor in self._tensors:
                for name in tensor.state:
                    tensor.whole(name)
            self._together.wait()
            return
        header = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": progress.step,
            "history": progress.history,
        }
        path = os.path.join(self._folder, f"step-{progress.step}-{self._key}.safetensors")
        text = json.dumps(header, sort_keys=True)
        try:
            write_safetensors(path, _with_checksum(text, content), {_HEADER_KEY: text})
        except OSError as error:
            raise RecipeError(
                f"a checkpoint can't be written to {self._folder}: {error.strerror}. The last one "
                "is as it was: make room and give the same command again to go on; another place, "
                "named with --work-dir (SOMF_WORK_DIR), starts anew."
            ) from error
        self._good = [*(good for good in self._good if good != path), path][-GENERATIONS:]
        self._prune()
        self._together.wait()

    def _of_all(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """Return what all processes know of rows, in the rows' order."""
        known = [item for part in self._together.gathered([list(values.items())]) for item in part]
        return dict(sorted(known, key=lambda item: item[0]))

    def _prune(self) -> None:
        """Remove all but the good ones."""
        for _, _, path in self._found() if self._together.is_first else ():
            if path not in self._good:
                # One that can't be removed takes room, and is passed over.
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _tried(self, path: str) -> tuple[Progress, str]:
        """Return what a checkpoint holds, and what is wrong with it.

        Raises:
            RecipeError: this or another process can't open it.
        """
        closed, progress, problem = "", Progress(), ""
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            closed = f"{error.strerror} (process {self._together.rank})"
        reasons = [reason for reason in self._together.gathered([closed]) if reason]
        if reasons:
            raise RecipeError(
                f"checkpoint {path} can't be read: {reasons[0]}. Make it readable, for every "
                "process that learns, and give the same command again to go on; remove it to go "
                "on from the one before, or to begin anew."
            )
        try:
            progress = self._read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            problem = first_line(error)
        return progress, problem

    def _read(self, path: str) -> Progress:
        with safe_open(path, framework="pt") as file:
            text = file.metadata()[_HEADER_KEY]
            header, checksum = json.loads(text), xxhash.xxh3_128(text.encode())
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            if header["fingerprint"] != self._fingerprint:
                raise ValueError("it is of another recipe")
            shapes = {t.name: file.get_slice(f"logits/{t.name}").get_shape() for t in self._tensors}
            if any(tuple(shapes[t.name]) != t.layout.shape for t in self._tensors):
                raise ValueError("its masks have other shapes")
            values = {name: file.get_tensor(name) for name in _KEPT}
            for name in _KEPT:
                checksum.update(tensor_bytes(values[name]))
            for tensor in self._tensors:
                for name in tensor.state:
                    whole = file.get_tensor(f"{name}/{tensor.name}")
                    checksum.update(tensor_bytes(whole))
                    tensor.set_whole(whole, name)
            if bytes(file.get_tensor(_CHECKSUM).tolist()) != checksum.digest():
                raise ValueError("it is damaged (its checksum is another)")
            lengths = values[_LENGTHS].tolist()
            tokens = values[_UNMASKED].clone().split(lengths) if lengths else ()
            device = self._tensors[0].logits.device
            pairs = zip(values[_PAIRS].tolist(), values[_RATIOS].tolist(), strict=True)
            utility = zip(values[_TOKENS].tolist(), tokens, strict=True)
            return Progress(
                step=int(header["step"]),
                history=list(header["history"]),
                reference={row: (chosen, rejected) for row, (chosen, rejected) in pairs},
                unmasked={row: told.to(device) for row, told in utility},
            )

    def _found(self) -> list[tuple[int, str, str]]:
        """Return steps, recipes' keys and paths of all checkpoints, the oldest first."""
        matches = filter(None, map(_NAME.match, os.listdir(self._folder)))
        return sorted((int(m[1]), m[2], os.path.join(self._folder, m[0])) for m in matches)


def _say_nothing(_: str) -> None:
    """Take what another process says."""


def told_fingerprint(folder: str) -> Any:
    """Return the fingerprint in the newest checkpoint in a folder, None where none can be read."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names if _NAME.match(name)]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
            header = json.loads(safe_open(path, framework="pt").metadata()[_HEADER_KEY])
            return header["fingerprint"]
    return None


def _with_checksum(text: str, content: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return tensors with a last one: a checksum over ``text`` and what the others give."""
    checksum = xxhash.xxh3_128(text.encode())

    def counted(stored: StoredTensor) -> StoredTensor:
        def values() -> Tensor:
            found = stored.content().detach().to("cpu", stored.dtype)
            checksum.update(tensor_bytes(found))
            return found

        return replace(stored, content=values)

    def digest() -> Tensor:
        return torch.tensor(list(checksum.digest()), dtype=torch.uint8)

    last = StoredTensor(_CHECKSUM, (checksum.digest_size,), torch.uint8, digest)
    return [*map(counted, content), last]
