"""What a step of each form of a mask takes, beside today's default: seconds and memory, as ratios.

``python -m benchmarks.form_costs WORK`` makes models of SmolLM2-135M's shape with random weights in
WORK. Each form is learned in a process of its own, on the resident engine in float32; of its steps
the fastest counts, for other work on the machine only makes them slower.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from somf_mergekit.common.console import aligned_table
from somf_mergekit.common.requirements import versions

from .memory import peak_memory
from .real_data import pairs_of, write_pairs
from .speed_models import BASE, WEIGHT, make_models, specialists_of

RESULTS = Path(__file__).parent / "results"
SHAPE = "smollm2"
STEPS = 3
FORMS: dict[str, dict[str, str]] = {
    "row, one mask (the default)": {},
    "row, one mask, no noise": {"mask_noise": "none"},
    "row x column, one mask": {"granularity": "row_column"},
    "weight, one mask": {"granularity": "weight"},
    "row, one for each of two models": {"mask_sharing": "per_model"},
    "row x column, one for each": {"granularity": "row_column", "mask_sharing": "per_model"},
    "weight, one for each": {"granularity": "weight", "mask_sharing": "per_model"},
}


def learned(folder: Path, parameters: dict[str, str]) -> dict[str, float]:
    """Learn a mask of a form for a few steps; return its fastest step and the peak of memory."""
    from mergekit.options import MergeOptions

    from somf_mergekit import learn
    from somf_mergekit.common.machine import RESIDENT, MachineOptions
    from somf_mergekit.common.merge_options import SomfOptions

    content = {
        "merge_method": "somf",
        "base_model": str(folder / BASE),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": WEIGHT}}
            for name in specialists_of(SHAPE)
        ],
        "parameters": {
            "safety_dataset": str(folder / "pairs.jsonl"),
            "held_out_share": 0.0,
            "max_steps": STEPS,
            "batch_size": 8,
            "max_length": 64,
            **parameters,
        },
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }
    machine = MachineOptions(engine=RESIDENT, precision="float32", micro_batch_size=8)
    options = SomfOptions.of(MergeOptions(quiet=True)).model_copy(update={"machine": machine})
    place = folder / "masks" / "-".join(parameters.values() or ("default",))
    with peak_memory() as memory:
        learn(content, place, options)
    rows = (place / "training.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(row)["seconds"] for row in rows]
    return {"seconds": min(seconds), "peak_bytes": memory["peak"]}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="As of speed.py.")
@click.option("--record", is_flag=True, help="Store the results in the repository too.")
@click.option("--child", hidden=True)
def main(folder: Path, data: Path | None, record: bool, child: str | None) -> None:
    """Measure what learning each form takes, with models in FOLDER."""
    if child:
        click.echo(json.dumps(learned(folder, FORMS[child])))
        return
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(data)[: STEPS * 8 * 2]
    write_pairs(folder / "pairs.jsonl", pairs)
    texts = [pair.messages[-1]["content"] + pair.chosen for pair in pairs]
    make_models(folder, SHAPE, texts, "cpu")
    rows: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        command = [sys.executable, "-m", "benchmarks.form_costs", str(folder), "--child", form]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[form] = json.loads(ended.stdout.strip().splitlines()[-1])
        click.echo(f"{form}: {rows[form]}", err=True)
    first = next(iter(rows.values()))
    cells = [["form", "time of a step", "memory"]]
    for form, row in rows.items():
        ratios = (row[key] / first[key] for key in ("seconds", "peak_bytes"))
        cells.append([form, *(f"{ratio:.2f}" for ratio in ratios)])
    click.echo(aligned_table(cells))
    if record:
        content = {"versions": versions(), "steps": STEPS, "rows": rows}
        (RESULTS / "form_costs.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
