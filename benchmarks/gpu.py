"""What a GPU does in a few minutes, the most telling first; what is known when time is up is kept.

``python -m benchmarks.gpu --minutes 12 --data DIR`` times steps of a mask beside plain DPO at
1.1 B, adapters and whole weights of 8 B on a GPU of 12 and 24 GiB, and a whole training run; then
it checks that the GPU computes what the CPU does (gpu_agreement.py). Weights are random.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .circumstances import circumstances
from .gpu_agreement import name_of

_RECORD = "gpu_minutes.json"
_MAX_LENGTH = 128


@dataclass(frozen=True)
class Job:
    """What is timed by ``benchmarks.speed``, see its options.

    Attributes:
        name: in the record.
        model, ways, granularity: as there.
        memory: GiB of the GPU that are left free for it; None for all.
        steps: of 8 pairs.
    """

    name: str
    model: str
    ways: tuple[str, ...]
    granularity: str = "row"
    memory: float | None = None
    steps: int = 5

    def command(self, data: Path | None, work: Path, device: str) -> list[str]:
        """Return the command line; its record is written into ``work``."""
        options = {
            "model": self.model,
            "granularity": self.granularity,
            "gpu-memory": self.memory,
            "steps": self.steps,
            "batch-size": 8,
            "micro-batch": 1 if self.memory else 4,
            "max-length": _MAX_LENGTH,
            "device": device,
            "data": data,
            "work": work,
            "out": work / "speed",
        }
        given = [part for k, v in options.items() if v is not None for part in (f"--{k}", str(v))]
        ways = [part for way in self.ways for part in ("--way", way)]
        return [sys.executable, "-m", "benchmarks.speed", *given, *ways]


JOBS = (
    Job("a step, 1.1 B", "tinyllama", ("plain_dpo", "resident")),
    Job("a step, 1.1 B, an entry a weight", "tinyllama", ("plain_dpo", "resident"), "weight"),
    Job("8 B, an adapter, 4 bits, 24 GiB", "llama-8b-adapters", ("factored_4bit",), memory=24),
    Job("8 B, an adapter, 4 bits, 12 GiB", "llama-8b-adapters", ("factored_4bit",), memory=12),
    Job("8 B, an adapter, bfloat16, 24 GiB", "llama-8b-adapters", ("factored",), memory=24),
    Job("8 B, an adapter, 4 bits", "llama-8b-adapters", ("factored_4bit",)),
    Job("a whole training run, 1.1 B", "tinyllama", ("resident",), steps=240),
    Job("8 B, whole weights, 24 GiB", "llama-8b", ("streaming",), memory=24),
)
# On models that a CPU learns in seconds, to try the script.
TINY = (Job("an adapter, 4 bits", "tiny-adapters", ("factored_4bit",), steps=2),)


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=12.0, show_default=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Folder with the pairs.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(__file__).parent / "work")
@click.option("--device", default="cuda", show_default=True, help="Of torch.")
@click.option("--tiny", is_flag=True, help="Tiny models alone, to try the script.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results")
def main(minutes: float, data: Path | None, work: Path, device: str, tiny: bool, out: Path) -> None:
    """Measure what fits into some minutes, in order of worth, and print it as it comes."""
    end = time.monotonic() + 60 * minutes
    work, out = work.resolve() / "gpu-minutes", out.resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    record = {**circumstances(), "device": name_of(device), "results": found}
    for job in TINY if tiny else JOBS:
        for name, result in _timed(job, data, work, device, end):
            found[name] = result
            click.echo(f"{name}: {json.dumps(result)}")
            (out / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if tiny:
        return
    checks = [sys.executable, "-m", "benchmarks.gpu_agreement", "--device", device]
    checks += ["--work", str(work), "--out", str(out)]
    checks += ["--data", str(data)] if data else []
    click.echo(f"agreement with the CPU: {_ended(checks, end)}")


def _timed(
    job: Job, data: Path | None, work: Path, device: str, end: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a job's ways with what they took, or why they did not end."""
    place = work / "speed"
    before = {file: file.read_bytes() for file in place.glob("*.json")}
    ended = _ended(job.command(data, work, device), end)
    rows: dict[str, Any] = {}
    for file in place.glob("*.json"):
        if before.get(file) != file.read_bytes():
            rows = json.loads(file.read_text())["results"]
    for way in job.ways:
        row = dict(rows.get(way, {"failed": ended}))
        if "seconds" in row:
            # Of both answers of 8 pairs, none of which is longer.
            row["most_tokens_a_second"] = 8 * 2 * _MAX_LENGTH / row["seconds"]
            row["minutes_of_all_steps"] = sum(row.pop("all_seconds")) / 60
        yield f"{job.name}: {way}", row


def _ended(command: list[str], end: float) -> str:
    """Run a command, with all that it starts, until it ends or time is up; return how it ended."""
    left = end - time.monotonic()
    if left <= 0:
        return "no time left"
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return f"exit code {process.wait(timeout=left)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "cut off: time was up"


if __name__ == "__main__":
    main()
