"""Time and memory of learning a mask, against a plain DPO step and the naive way; of merging."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import yaml

from somf_mergekit.common.machine import ENGINES, SHARDED
from somf_mergekit.common.process_group import is_first
from somf_mergekit.mask.granularity import GRANULARITIES

from .memory import peak_memory
from .real_data import pairs_of, write_pairs
from .speed_models import BASE, SHAPES, WEIGHT, has_way, make_models, references_of, weight_count
from .speed_table import FINEST, MERGE_RUNS, MERGES, WAYS, write_record

SHARING_PROCESSES = 2
# A first step pays for allocations and compilations that later ones do not.
UNTIMED_STEPS = 1


@click.command()
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help=f"A shape with random weights ({', '.join(SHAPES)}), a hub id, or a folder.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Folder with the pairs as JSON lines (name in real_data.py).  [default: from the hub]",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path(__file__).parent / "work")
@click.option("--steps", default=4, show_default=True, help="Steps a way; the first is not timed.")
@click.option("--batch-size", default=16, show_default=True, help="Pairs a step.")
@click.option("--micro-batch", default=4, show_default=True, help="Pairs at once.")
@click.option("--max-length", default=128, show_default=True)
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    default=FINEST,
    show_default=True,
    help="Of the mask; the finest takes most.",
)
@click.option("--device", default="cpu", show_default=True, help="Of torch, as cuda.")
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB of the GPU's memory that are left free for a process.  [default: all]",
)
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice([*WAYS, *MERGES]),
    default=[*WAYS, *MERGES],
    show_default="all",
    help="What to measure. Other figures of a record with equal settings and versions stay.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results")
@click.option("--child", hidden=True)
def main(model: str, data: Path | None, work: Path, child: str | None, **options: Any) -> None:
    """Measure seconds a step and peak memory of each way, in a process of its own each.

    Needs the package with its dependencies, and memory for the naive way: over 80 bytes a weight.
    """
    folder = work.resolve() / f"speed-{Path(model).name}"
    if child:
        found = json.dumps(_measured_here(child, folder, options, model))
        if is_first():
            click.echo(found)
        return
    pairs = pairs_of(data)[: options["steps"] * options["batch_size"] * 2]
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", pairs)
    texts = [pair.messages[-1]["content"] + pair.chosen for pair in pairs]
    make_models(folder, model, texts, options["device"])
    if options["device"] != "cpu":
        _give_back_gpu_memory()
    rows: dict[str, dict[str, Any]] = {}
    ways = options.pop("ways")
    for name in (way for way in WAYS if way in ways and has_way(model, way)):
        rows[name] = _in_a_process(name, model, work, options)
        click.echo(f"{name}: {json.dumps(rows[name])}", err=True)
    rows |= _merges([way for way in MERGES if way in ways], model, work, options)
    if options["device"] == "cpu":
        rows["import"] = _import_seconds()
    click.echo(write_record(rows, weight_count(folder / BASE), model, options))


def _give_back_gpu_memory() -> None:
    # What torch keeps for later would be missing in the processes that are measured.
    import torch

    torch.cuda.empty_cache()


def _merges(
    names: list[str], model: str, work: Path, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(MERGE_RUNS):
        for name in names:
            runs[name].append(_in_a_process(name, model, work, options))
            click.echo(f"{name}: {json.dumps(runs[name][-1])}", err=True)
    rows = {}
    for name, found in runs.items():
        failed = next((run for run in found if "failed" in run), None)
        rows[name] = failed or {
            "seconds": median(run["seconds"] for run in found),
            "all_seconds": [run["seconds"] for run in found],
            "peak_bytes": max(run["peak_bytes"] for run in found),
        }
    return rows


def _in_a_process(name: str, model: str, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable]
    if name == SHARDED:
        shared = ["--standalone", "--nproc-per-node", str(SHARING_PROCESSES)]
        command += ["-m", "torch.distributed.run", *shared]
    command += ["-m", "benchmarks.speed", "--child", name, "--model", model]
    command += ["--work", str(work), "--steps", str(options["steps"])]
    command += ["--batch-size", str(options["batch_size"])]
    command += ["--micro-batch", str(options["micro_batch"])]
    command += ["--max-length", str(options["max_length"]), "--device", options["device"]]
    command += ["--granularity", options["granularity"]]
    if options["gpu_memory"]:
        command += ["--gpu-memory", str(options["gpu_memory"])]
    # What is compared is merging.
    env = {**os.environ, "SOMF_REPORT": "none"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {ended.returncode}: {last}"}
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def _measured_here(name: str, folder: Path, options: dict[str, Any], model: str) -> dict[str, Any]:
    import torch

    is_on_gpu = options["device"] != "cpu"
    taken = 0
    if options["gpu_memory"]:
        # What fills the rest is seen by whoever asks what is free, unlike a limit of torch's.
        free, _ = torch.cuda.mem_get_info(options["device"])
        taken = max(0, free - int(options["gpu_memory"] * 2**30))
    rest = torch.empty(taken, dtype=torch.uint8, device=options["device"])
    if name in MERGES:
        return _merge(name, folder, model, options["device"])
    mask_seconds: list[float] = []
    with peak_memory() as memory:
        if name.partition("_")[0] in ENGINES:
            seconds, mask_seconds = _ours(name, folder, options, model)
        else:
            seconds = _other(name, folder, options)
    found = {
        "seconds": median(seconds[UNTIMED_STEPS:] or seconds),
        "all_seconds": seconds,
        "peak_bytes": memory["peak"],
    }
    if is_on_gpu:
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() - rest.nbytes
    # A GPU does its work later than it is asked to.
    if mask_seconds and not is_on_gpu:
        found["mask_seconds"] = median(mask_seconds[UNTIMED_STEPS:] or mask_seconds)
    return found


def _other(name: str, folder: Path, options: dict[str, Any]) -> list[float]:
    from . import speed_ways

    work = speed_ways.Work(
        folder=folder,
        pairs=folder / "pairs.jsonl",
        steps=options["steps"],
        batch_size=options["batch_size"],
        micro_batch=options["micro_batch"],
        max_length=options["max_length"],
        device=options["device"],
    )
    found: list[float] = getattr(speed_ways, name)(work)
    return found


def _ours(
    engine: str, folder: Path, options: dict[str, Any], model: str
) -> tuple[list[float], list[float]]:
    """Return the seconds of each step, and of its work on masks."""
    from mergekit.options import MergeOptions

    from somf_mergekit import learn
    from somf_mergekit.learner import passes, tensors

    engine, _, os.environ["SOMF_BASE_PRECISION"] = engine.partition("_")
    os.environ["SOMF_ENGINE"] = engine
    os.environ["SOMF_MICRO_BATCH_SIZE"] = str(options["micro_batch"])
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                if spent:
                    spent[-1] += time.perf_counter() - start

        return call

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            spent.append(0.0)
            return function(*arguments)

        return call

    for name in ("write", "update"):
        setattr(tensors.MaskedTensor, name, timed(getattr(tensors.MaskedTensor, name)))
    passes.Passes.learn = counted(passes.Passes.learn)  # type: ignore[method-assign]
    content = _recipe(
        folder,
        model,
        "somf",
        safety_dataset=str(folder / "pairs.jsonl"),
        max_steps=options["steps"],
        granularity=options["granularity"],
        batch_size=options["batch_size"],
        max_length=options["max_length"],
        # A new mask each time, the same in all processes: one that is there would be used again.
        seed=os.getppid() if engine == SHARDED else time.time_ns() % 2**31,
    )
    cache = str(folder / "put-together")
    learn(content, folder / "mask", MergeOptions(device=options["device"], lora_merge_cache=cache))
    rows = (folder / "mask" / "training.jsonl").read_text().splitlines()
    return [json.loads(row)["seconds"] for row in rows], spent


def _merge(name: str, folder: Path, model: str, device: str) -> dict[str, Any]:
    given = {"mask": str(folder / "mask")} if name == "somf" else {}
    recipe = folder / f"{name}.yml"
    recipe.write_text(yaml.safe_dump(_recipe(folder, model, name, **given)))
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    start = time.perf_counter()
    with peak_memory() as memory:
        options = MergeOptions(
            quiet=True, device=device, lora_merge_cache=str(folder / "put-together")
        )
        run_merge(config, str(folder / f"merged-{name}"), options)
    return {"seconds": time.perf_counter() - start, "peak_bytes": memory["peak"]}


def _recipe(folder: Path, model: str, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(folder / BASE),
        "models": [
            {"model": name, "parameters": {"weight": WEIGHT}}
            for name in references_of(folder, model)
        ],
        **({"parameters": parameters} if parameters else {}),
        "dtype": "bfloat16",
        "tokenizer": {"source": "base"},
    }


def _import_seconds() -> dict[str, float]:
    """Return the processor seconds of `import torch` with and without the registration."""
    script = "import time; s = time.process_time(); import torch; print(time.process_time() - s)"
    found: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(5):
        for name, autoload in (("with", "1"), ("without", "0")):
            env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
            ended = subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
            )
            found[name].append(float(ended.stdout))
    return {name: median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
