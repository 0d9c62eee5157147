"""Makes one mask or one model, in a process of its own: what it took is what the method took."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from .memory import peak_memory
from .plain_dpo import dpo_seconds, micro_batches
from .real_training import Training, load_saved, make_finetuned, make_specialist, save_whole

# Pairs that go through the model at once in DPO.
MICRO_BATCH = 4
# Of the safety-tuned model: the safe answers of so many pairs, as the aligned base was trained.
SAFE = "safe"
_CLIPPED = 1.0

Task = dict[str, Any]


def in_a_process(task: Task) -> dict[str, Any]:
    """Do the task and return what it took: seconds, peak bytes, threads.

    Raises:
        click.ClickException: it fails.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare_make"],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if ended.returncode:
        raise click.ClickException(f"{task['what']} ended with {ended.returncode}, see above")
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def here(task: Task) -> dict[str, Any]:
    """Do the task in this process; see ``in_a_process``."""
    import torch

    import somf_mergekit

    # What all need is imported before the clock runs.
    somf_mergekit.register()
    import_module("mergekit.merge")
    makers = {"learn": _learn, "merge": _merge, "finetune": _finetune}
    start = time.perf_counter()
    with peak_memory() as memory:
        makers[task["what"]](task)
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": memory["peak"],
        "threads": torch.get_num_threads(),
    }


def _learn(task: Task) -> None:
    """Learn the mask of ``recipe`` into ``folder``."""
    from somf_mergekit import learn

    learn(_resolved(task["recipe"], task["names"]), task["folder"])


def _merge(task: Task) -> None:
    """Merge ``recipes`` one after the other, and train by ``dpo`` where it is given.

    ``folder`` appears when all is done.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    folder, names = Path(task["folder"]), dict(task["names"])
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    last = scratch
    for number, recipe in enumerate(task["recipes"]):
        last = scratch / str(number)
        config = MergeConfiguration.model_validate(_resolved(recipe, names))
        # DARE draws from it.
        run_merge(config, str(last), MergeOptions(quiet=True, random_seed=task["seed"]))
        names["merged"] = str(last)
    if task["dpo"]:
        last = _trained(last, scratch / "dpo", Path(names["pairs"]), task["dpo"])
    os.rename(last, folder)
    shutil.rmtree(scratch)


def _trained(start: Path, folder: Path, source: Path, settings: dict[str, Any]) -> Path:
    """Train the model in ``start`` by DPO on the pairs and in the order that a mask learns from."""
    import torch

    from somf_mergekit.learner.loop import rate_share
    from somf_mergekit.recipe import Settings

    model, tokenizer = load_saved(start)
    steps = settings["max_steps"]
    settings = {"objective": "dpo", **settings}
    own = Settings(**settings)
    learned = batches_of_pairs(source, tokenizer, own)
    plan = [micro_batches(batch, MICRO_BATCH) for batch in learned]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def before_step(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIPPED)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate_share(step, steps, own.warmup)

    dpo_seconds(model, optimizer, plan, before_step, own.objective, own.beta)
    save_whole(model, tokenizer, folder, settings)
    return folder


def batches_of_pairs(source: Path, tokenizer: Any, settings: Any) -> list[list[Any]]:
    """Return the pairs of each step that a mask learns from, with recipe settings, in its order."""
    from somf_mergekit.inputs import preference_data
    from somf_mergekit.learner.loop import batches
    from somf_mergekit.preferences import read_pairs

    encoded = preference_data(read_pairs(str(source)), str(source), tokenizer, settings).pairs
    planned = batches(len(encoded), settings, settings.max_steps)
    return [[encoded[row] for row in rows] for rows in planned]


def _finetune(task: Task) -> None:
    """Fine-tune a specialist, or the model that is tuned for safety, from the aligned base."""
    from somf_mergekit.preferences import read_pairs

    folder, names, training = Path(task["folder"]), task["names"], Training(**task["training"])
    data = Path(task["data"]) if task["data"] else None
    if task["name"] != SAFE:
        make_specialist(folder, Path(names["aligned"]), task["name"], data, training)
        return
    source = names["pairs"]
    chosen = read_pairs(source).sampled(training.examples, training.seed)
    examples = [(pair.messages, pair.chosen) for pair in chosen]
    make_finetuned(folder, Path(names["aligned"]), examples, training, "safe answers")


def _resolved(value: Any, names: dict[str, str]) -> Any:
    """Return a recipe with the paths that its @names stand for."""
    if isinstance(value, dict):
        return {key: _resolved(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolved(part, names) for part in value]
    if isinstance(value, str) and value.startswith("@"):
        return names[value[1:]]
    return value


if __name__ == "__main__":
    found = here(json.loads(sys.stdin.read()))
    print(json.dumps(found))
