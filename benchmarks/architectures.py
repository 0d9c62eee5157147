"""Which families of models can be learned on, merged and loaded.

    python -m benchmarks.architectures --out benchmarks/results [FAMILY ...]

Makes a tiny random base of each family and two specialists, learns a mask and merges by the stock
`mergekit-yaml`, and compares what is written with the formula and with what learning saw. Writes
`architectures.json` and `architectures.md` as it goes.
"""

import copy
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import mergekit.scripts.run_yaml
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from somf_mergekit import MaskSet, RecipeError, learn
from somf_mergekit.common.machine import MachineOptions
from somf_mergekit.common.merge_options import SomfOptions
from somf_mergekit.common.model_classes import auto_class
from somf_mergekit.demo.demo_data import demo_data, preference_rows, texts
from somf_mergekit.demo.demo_models import word_tokenizer

from .circumstances import circumstances
from .families import FAMILIES, Family

WEIGHTS = {"first": 0.4, "second": 0.7}
HELD_OUT = 6
PAIRS = 24


@dataclass
class Row:
    """What became of a family.

    Attributes:
        family: its name.
        kind: of what it is an example.
        model: its class.
        tensors_in: of the base's checkpoint.
        tensors_out: of the merge's, all under the base's names.
        missing: weights that the merge's class does not find in it.
        formula: largest distance of a written tensor from the formula.
        learned: distance of the held-out margin of the model that learning saw from that of the
            model that was written, in nats a token.
        engines: largest distance of the masks that the two engines learned.
        streaming: why the streaming engine can't run it, if it can't.
        masked: tensors with a mask.
        problem: what went wrong, if anything did.
    """

    family: str
    kind: str
    model: str = ""
    tensors_in: int = 0
    tensors_out: int = 0
    missing: int = 0
    formula: float = 0.0
    learned: float = 0.0
    engines: float = 0.0
    streaming: str = ""
    masked: int = 0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether everything is as it should be."""
        return (
            not self.problem
            and self.tensors_in == self.tensors_out
            and not self.missing
            and self.masked > 0
            and max(self.formula, self.engines) <= 1e-6
            and self.learned <= 1e-5
        )


def made_models(family: Family, tokenizer: Any, folder: Path, rows: int | None = None) -> str:
    """Save a random base and two specialists of a family into a folder; return their class.

    Args:
        family: of the models.
        tokenizer: theirs.
        folder: where they go, as `base`, `first` and `second`.
        rows: of the embeddings, where that is more than there are tokens.
    """
    config = family.made(rows or len(tokenizer))
    auto = (
        transformers.AutoModelForImageTextToText
        if "vision_config" in family.own
        else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    base = auto.from_config(config).float()
    for seed, label in enumerate(("base", *WEIGHTS)):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            if seed:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data += 0.02 * noise
        model.save_pretrained(folder / label)
        tokenizer.save_pretrained(folder / label)
    return type(base).__name__


def measured(name: str, tokenizer: Any, pairs: Sequence[dict[str, str]], folder: Path) -> Row:
    """Learn, merge and load a family in a folder, and compare.

    Args:
        name: of the family.
        tokenizer: of its models.
        pairs: preference pairs, each of another prompt.
        folder: empty.
    """
    row = Row(name, FAMILIES[name].kind)
    row.model = made_models(FAMILIES[name], tokenizer, folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = folder / "recipe.yml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "somf",
                "base_model": str(folder / "base"),
                "models": [
                    {"model": str(folder / label), "parameters": {"weight": weight}}
                    for label, weight in WEIGHTS.items()
                ],
                "parameters": {
                    "safety_dataset": str(folder / "pairs.jsonl"),
                    "max_steps": 2,
                    "learning_rate": 0.1,
                    "batch_size": 4,
                    "held_out_share": HELD_OUT / PAIRS,
                },
                "dtype": "float32",
            }
        )
    )
    arguments = [str(recipe), str(folder / "out"), "--no-write-model-card", "--quiet"]
    settings = {"SOMF_ENGINE": "resident", "SOMF_REPORT": "none"}
    result = CliRunner().invoke(mergekit.scripts.run_yaml.main, arguments, env=settings)
    if result.exit_code:
        found = result.output.strip() or repr(result.exception)
        row.problem = " ".join(found.split())[-300:]
        return row
    masks = MaskSet.open(folder / "out")
    stored = {label: _tensors(folder / label) for label in ("base", *WEIGHTS, "out")}
    row.tensors_in, row.masked = len(stored["base"]), len(masks.names())
    row.tensors_out = len(stored["out"].keys() & stored["base"].keys())
    row.formula = max(_distances(masks, stored))
    config = transformers.AutoConfig.from_pretrained(folder / "out")
    loaded, info = auto_class(config).from_pretrained(folder / "out", output_loading_info=True)
    row.missing = len(info["missing_keys"])
    # Learning takes the pairs in this order, and holds out the last.
    order = list(range(PAIRS))
    random.Random(0).shuffle(order)
    # Some classes of models have a tokenizer of their own, whatever is stored.
    written = transformers.AutoTokenizer.from_pretrained(folder / "out")
    found = preference_margin(loaded, written, [pairs[row] for row in order[-HELD_OUT:]])
    row.learned = abs(masks.provenance["held_out"]["merge"]["margin"] - found)
    machine = MachineOptions(engine="streaming", report="none")
    options = SomfOptions(machine=machine, quiet=True)
    try:
        row.engines = _difference(masks, learn(recipe, folder / "streamed", options))
    except RecipeError as error:
        row.streaming = error.message
    return row


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def _distances(masks: MaskSet, stored: dict[str, dict[str, torch.Tensor]]) -> Iterator[float]:
    """Yield how far each written tensor is from start + sum of w * change * mask / mean(mask)."""
    names = set(masks.names())
    for name, start in stored["base"].items():
        mask = masks.probabilities(name) if name in names else torch.ones(1)
        change = sum(weight * (stored[label][name] - start) for label, weight in WEIGHTS.items())
        expected = start + change * (mask / mask.mean())
        yield float((stored["out"][name] - expected).abs().max())


@torch.no_grad()
def preference_margin(model: Any, tokenizer: Any, pairs: Sequence[dict[str, str]]) -> float:
    """Return by how many nats a token a model likes safe answers more, plainly computed."""
    model = model.float().eval()

    def likelihood(prompt: str, answer: str) -> float:
        turns = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": answer})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        start = len(tokenizer(asked, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False).input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :]
        return float(found.mean())

    margins = [
        likelihood(pair["prompt"], pair["chosen"]) - likelihood(pair["prompt"], pair["rejected"])
        for pair in pairs
    ]
    return sum(margins) / len(margins)


def _difference(masks: MaskSet, others: MaskSet) -> float:
    if masks.names() != others.names():
        return float("inf")
    return max(
        float((masks.probabilities(name) - others.probabilities(name)).abs().max())
        for name in masks.names()
    )


def inputs() -> tuple[Any, list[dict[str, str]]]:
    """Return the tokenizer of all families, and the pairs: the demo's, each of another prompt."""
    data = demo_data(0, train=200, held_out=40)
    return word_tokenizer(texts(data)), preference_rows(
        data, harmful=PAIRS // 2, harmless=PAIRS // 2, seed=0
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table."""
    lines = [
        "| family | kind | class | learns | streams | tensors in, out | missing | masked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        learns = "yes" if row.is_right else f"no: {row.problem}" if row.problem else "wrongly"
        lines.append(
            f"| {row.family} | {row.kind} | {row.model} | {learns} | "
            f"{'no' if row.streaming else 'yes'} | {row.tensors_in}, {row.tensors_out} | "
            f"{row.missing} | {row.masked} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("families", nargs=-1)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(families: tuple[str, ...], out: Path) -> None:
    """Measure FAMILIES (all of them, if none is named) and write what was found into --out."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer, pairs = inputs()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measured(name, tokenizer, pairs, Path(folder))
            except Exception as error:
                row = Row(name, FAMILIES[name].kind, problem=repr(error)[:300])
        rows.append(row)
        click.echo(f"{name}: {'right' if row.is_right else row}")
        content = {**circumstances(), "rows": [asdict(row) for row in rows]}
        (out / "architectures.json").write_text(json.dumps(content, indent=1) + "\n")
        (out / "architectures.md").write_text(table(rows))


if __name__ == "__main__":
    main()
