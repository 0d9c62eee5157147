"""Kill learning at random moments, go on with it, and compare the end with one never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import yaml

from .circumstances import circumstances
from .speed_models import BASE, SPECIALISTS, WEIGHT, make_models

STEPS = 60
# All of an artifact but the times of its steps.
FILES = ("masks.safetensors", "somf.json")


@click.command()
@click.option("--kills", default=20, show_default=True, help="How often the process is killed.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--engine", default="resident", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results")
def main(kills: int, seed: int, engine: str, out: Path) -> None:
    """Learn a mask with a checkpoint after each step, killed by SIGKILL again and again.

    Half of the moments are drawn from the whole run, start included; the others while a checkpoint
    is being written. An end that differs is an error, and leaves no record.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = _recipe(work)
        start = time.monotonic()
        _started(recipe, work / "whole", engine).wait()
        seconds = time.monotonic() - start
        moments = []
        for number in range(kills):
            began = time.time()
            process = _started(recipe, work / "mask", engine)
            if number % 2:
                # Not the first checkpoint each time: learning is to come to an end.
                wanted = _step(work) + draw.randrange(1, 1 + STEPS // kills * 2)
                while process.poll() is None and not (
                    _step(work) >= wanted and _writes(work / "mask.learning", began)
                ):
                    time.sleep(0.0005)
            else:
                time.sleep(draw.random() * seconds)
            writing = _writes(work / "mask.learning", began)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append({"ended": ended, "writing": writing, "step": _step(work)})
            click.echo(json.dumps(moments[-1]), err=True)
            if (work / "mask").exists():
                _compare(work)
                os.replace(work / "mask", work / f"mask-{number}")
        code = _started(recipe, work / "mask", engine).wait()
        if code:
            raise click.ClickException(f"the last run ended with {code}")
        _compare(work)
        left = (work / "mask.learning").exists()
    record = {
        **circumstances(),
        "engine": engine,
        "steps": STEPS,
        "kills": sum(not moment["ended"] for moment in moments),
        "kills while writing": sum(m["writing"] and not m["ended"] for m in moments),
        "left behind": left,
        "moments": moments,
    }
    (out / f"kills-{engine}.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(f"{record['kills']} kills, {record['kills while writing']} of them while writing")


def _recipe(work: Path) -> Path:
    rows = [
        {"prompt": f"question {n}", "chosen": f"I won't say {n}", "rejected": f"it is {n} {n}"}
        for n in range(48)
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_models(work, "tiny", [row["chosen"] for row in rows])
    content = {
        "merge_method": "somf",
        "base_model": str(work / BASE),
        "models": [
            {"model": str(work / name), "parameters": {"weight": WEIGHT}} for name in SPECIALISTS
        ],
        "parameters": {
            "safety_dataset": str(work / "pairs.jsonl"),
            "max_steps": STEPS,
            # The finest mask has the largest checkpoints.
            "granularity": "weight",
            "epochs": 10,
            "batch_size": 4,
            "max_length": 32,
        },
        "dtype": "float32",
    }
    recipe = work / "recipe.yml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def _started(recipe: Path, mask: Path, engine: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "somf_mergekit", "learn", str(recipe), str(mask), "--quiet"],
        env={**os.environ, "SOMF_CHECKPOINT_MINUTES": "0", "SOMF_ENGINE": engine},
        stdout=subprocess.DEVNULL,
    )


def _writes(folder: Path, since: float) -> bool:
    """Return whether a checkpoint is being written by a process that was started ``since``."""
    try:
        return any(file.stat().st_mtime > since for file in folder.glob("*.partial"))
    except FileNotFoundError:
        return False


def _step(work: Path) -> int:
    folder = work / "mask.learning"
    names = os.listdir(folder) if folder.is_dir() else []
    found = [int(name.split("-")[1]) for name in names if name.endswith(".safetensors")]
    return max(found, default=0)


def _compare(work: Path) -> None:
    for name in FILES:
        if (work / "mask" / name).read_bytes() != (work / "whole" / name).read_bytes():
            raise click.ClickException(f"{name} differs from that of the run never stopped")


if __name__ == "__main__":
    main()
