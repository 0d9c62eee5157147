"""Whether a GPU computes what the CPU computes: learning, merging, repairs, measuring.

The kernels are compared with torch when they are first used, see ``learner/triton_check.py``.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import yaml

from somf_mergekit.repairs.catalogue import REPAIRS

from .circumstances import circumstances
from .real_data import pairs_of, write_examples, write_pairs
from .speed_models import BASE, SPECIALISTS, WEIGHT, make_models

STEPS = 6
# Each is learned on both devices by both engines.
LEARNED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one entry a weight": {"granularity": "weight"},
    "sampled, reference redrawn": {"mask_kind": "sampled", "reference": "redrawn"},
    "binary, IPO, a weight": {"mask_kind": "binary", "objective": "ipo", "granularity": "weight"},
    "linear, not rescaled": {"fusion": "linear", "mask_rescale": "none", "reference": "base"},
    "TIES": {"fusion": "ties"},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "linear": {},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "della": {"density": 0.6, "epsilon": 0.2},
    "dare_ties": {"density": 0.6},
}


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Folder with the pairs.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(__file__).parent / "work")
@click.option("--device", default="cuda", show_default=True, help="Of torch.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results")
def main(data: Path | None, work: Path, device: str, out: Path) -> None:
    """Do everything on the CPU and on another device, and write how far the results are apart."""
    folder = work.resolve() / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(data)[:160]
    write_pairs(folder / "pairs.jsonl", pairs)
    write_examples(folder / "answers.jsonl", [(p.messages, p.chosen) for p in pairs[:24]])
    texts = [pair.messages[-1]["content"] + pair.chosen for pair in pairs]
    make_models(folder, "tiny", texts)
    found: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    record = {**circumstances(), "device": name_of(device), "results": found}
    for name, difference in _Checks(folder, device).all():
        found[name] = difference
        click.echo(f"{name}: {difference}", err=True)
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")


class _Checks:
    def __init__(self, folder: Path, device: str):
        self.folder = folder
        self.device = device

    def all(self) -> Iterator[tuple[str, Any]]:
        """Yield what was done, and by how much the results differ, or what went wrong."""
        checks: dict[str, Callable[[], Any]] = {}
        checks["learning twice on the device"] = lambda: self._again()
        for fusion in FUSIONS:
            checks[f"merging: {fusion}"] = lambda f=fusion: self._merging(f)
        for method in REPAIRS:
            checks[f"repairing: {method}"] = lambda m=method: self._repairing(m)
        checks["mergekit-yaml --device, learning and merging"] = lambda: self._stock()
        checks["measuring"] = lambda: self._measuring()
        for name, engine in product(LEARNED, ("resident", "streaming")):
            checks[f"learning: {name}, {engine}"] = lambda n=name, e=engine: self._learning(n, e)
        for name, check in checks.items():
            try:
                yield name, check()
            # The others are still tried.
            except Exception as error:
                yield name, f"failed: {type(error).__name__}: {str(error)[:600]}"

    def _learning(self, name: str, engine: str) -> dict[str, Any]:
        # On the CPU the engines learn the same mask, bit for bit.
        expected = self._learned(name, "resident", "cpu")
        return _difference(self._learned(name, engine, self.device), expected)

    def _again(self) -> dict[str, Any]:
        first = self._learned("one entry a weight", "resident", self.device)
        return _difference(first, self._learned("one entry a weight", "resident", self.device, "2"))

    def _learned(self, name: str, engine: str, device: str, again: str = "") -> Path:
        from mergekit.options import MergeOptions

        from somf_mergekit import learn

        place = self.folder / "masks" / f"{name}-{engine}-{device}{again}".replace(" ", "-")
        if not (place / "training.jsonl").exists():
            content = self._recipe(
                "somf",
                safety_dataset=str(self.folder / "pairs.jsonl"),
                max_steps=STEPS,
                batch_size=8,
                max_length=128,
                **LEARNED[name],
            )
            with _environment(SOMF_ENGINE=engine, SOMF_PRECISION="float32"):
                learn(content, place, MergeOptions(device=device))
        return place

    def _merging(self, fusion: str) -> dict[str, Any]:
        mask = str(self._learned("one entry a weight", "resident", "cpu"))
        content = self._recipe("somf", mask=mask, fusion=fusion, **FUSIONS[fusion])
        return self._merged(content, f"merged-{fusion}")

    def _repairing(self, method: str) -> dict[str, Any]:
        base = str(self.folder / BASE)
        models: list[dict[str, Any]] = []
        for role in REPAIRS[method].needs:
            # Any model will do, under a name of its own.
            model = self.folder / role
            if not model.exists():
                model.symlink_to(self.folder / SPECIALISTS[role != "fine_tuned"])
            models.append({"model": str(model)})
            if role != "fine_tuned":
                models[-1]["parameters"] = {"role": role}
        content = {
            "merge_method": method,
            "base_model": base,
            "models": models,
            "dtype": "float32",
        }
        return self._merged(content, f"repaired-{method}")

    def _merged(self, content: dict[str, Any], name: str) -> dict[str, Any]:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        outs = []
        for device in ("cpu", self.device):
            outs.append(self.folder / f"{name}-{device}")
            with _environment(SOMF_REPORT="none"):
                run_merge(
                    MergeConfiguration.model_validate(content),
                    str(outs[-1]),
                    MergeOptions(device=device, quiet=True),
                )
        return _of_tensors(*map(_tensors_of, outs))

    def _stock(self) -> dict[str, Any]:
        content = self._recipe(
            "somf", safety_dataset=str(self.folder / "pairs.jsonl"), max_steps=STEPS, batch_size=8
        )
        place = self.folder / "stock.yml"
        place.write_text(yaml.safe_dump(content))
        outs = []
        for device in ("cpu", self.device):
            outs.append(self.folder / f"stock-{device}")
            script = "from mergekit.scripts.run_yaml import main; main()"
            with _environment(SOMF_PRECISION="float32"):
                done = subprocess.run(
                    [sys.executable, "-c", script, place, outs[-1], "--device", device],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            if done.returncode:
                raise RuntimeError(done.stderr[-500:])
        return _of_tensors(*map(_tensors_of, outs))

    def _measuring(self) -> dict[str, Any]:
        results = []
        for device in ("cpu", self.device):
            out = self.folder / f"measured-{device}"
            said = str(self.folder / "answers.jsonl")
            command = [sys.executable, "-m", "somf_mergekit", "evaluate"]
            command += [str(self.folder / name) for name in (BASE, SPECIALISTS[0])]
            command += ["--safety", said, "--pairs", str(self.folder / "pairs.jsonl")]
            command += ["--skill", f"math={said}", "--device", device, "--out", str(out)]
            command += ["--max-new-tokens", "16", "--dtype", "float32"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-500:])
            results.append(json.loads((out / "evaluation.json").read_text())["measures"])
        apart = {}
        for ours, theirs in zip(*results, strict=True):
            for model, found in ours["models"].items():
                name = f"{ours['set']}, {ours['measure']}, {model}"
                apart[name] = abs(found["value"] - theirs["models"][model]["value"])
        worst = max(apart, key=lambda name: apart[name])
        return {"figures": len(apart), "largest": apart[worst], "of": worst}

    def _recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": str(self.folder / BASE),
            "models": [
                {"model": str(self.folder / name), "parameters": {"weight": WEIGHT}}
                for name in SPECIALISTS
            ],
            "parameters": parameters,
            "dtype": "float32",
            "tokenizer": {"source": "base"},
        }


def _difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """Return how far two learned masks, and the losses on the way, are apart."""
    from somf_mergekit import MaskSet

    losses = [
        [json.loads(row)["loss"] for row in (place / "training.jsonl").read_text().splitlines()]
        for place in (ours, theirs)
    ]
    masks = [MaskSet.open(place) for place in (ours, theirs)]
    tensors = [{name: mask.probabilities(name) for name in mask.names()} for mask in masks]
    return {
        "steps": len(losses[1]),
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        **_of_tensors(*tensors),
        "moved": max(float((t - t.mean()).abs().max()) for t in tensors[0].values()),
    }


def _of_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    if ours.keys() != theirs.keys():
        raise RuntimeError("other tensors are there")
    apart = torch.cat([(ours[name].float() - theirs[name].float()).flatten() for name in ours])
    return {
        "largest": float(apart.abs().max()),
        "above 1e-3": float((apart.abs() > 1e-3).float().mean()),
        "mean": float(apart.mean()),
    }


def _tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    with mock.patch.dict("os.environ", values):
        yield


def name_of(device: str) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
