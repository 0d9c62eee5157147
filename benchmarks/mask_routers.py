"""Whether a mixture's routers should be masked: the demo's models as mixtures of experts.

    python -m benchmarks.mask_routers --out benchmarks/results [--seeds 3]

Trains the demo's base and specialists with four experts a layer, two for each token, merges them
plainly, under a learned mask, and under one that leaves the routers out. Writes `mask_routers.json`
and `mask_routers.md` as it goes.
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from torch import Tensor

from somf_mergekit.common.console import no_model_bars
from somf_mergekit.data.chat import encoded
from somf_mergekit.demo.demo import BASE, CODE, NUMBERS, make_models
from somf_mergekit.demo.demo_data import DemoData, demo_data, preference_rows, texts
from somf_mergekit.demo.demo_folder import (
    PAIRS,
    demo_recipes,
    run_command,
    write_pairs,
    write_recipe,
)
from somf_mergekit.demo.demo_models import DemoSettings, loaded_model, word_tokenizer
from somf_mergekit.demo.demo_table import measured_scores

from .circumstances import circumstances

EXPERTS, PER_TOKEN = 4, 2
ROUTERS = "*.mlp.gate.*"
PLAIN = "task_arithmetic"
MEASURES = {
    "refusal": "refuses harmful",
    "over_refusal": "refuses harmless",
    "everyday": "everyday answers",
    "numbers": "numbers",
    "code": "code",
    "from_base": "routes changed from the base's",
    "from_plain": "from the plain merge's",
}


def new_mixture(tokenizer: Any, settings: DemoSettings, seed: int) -> Any:
    """Return a mixture with random weights: as much for each token as in the demo's Llama."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        moe_intermediate_size=3 * settings.hidden_size // PER_TOKEN,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden_size // settings.heads,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        norm_topk_prob=True,
        max_position_embeddings=settings.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)


@torch.no_grad()
def routes(model: Any, tokenizer: Any, data: DemoData, settings: DemoSettings) -> Tensor:
    """Return the experts of each held-out token in each layer: (places, PER_TOKEN), sorted."""
    found = []
    for split in data.splits:
        for messages, answer in split.held_out:
            text = encoded(tokenizer, messages, [answer], settings.max_length)
            ids = torch.tensor([text.prompt + text.answers[0]])
            layers = model(input_ids=ids, output_router_logits=True).router_logits
            found += [logits.topk(PER_TOKEN).indices.sort().values for logits in layers]
    return torch.cat(found)


def merge_recipes(settings: DemoSettings, seed: int) -> dict[str, dict[str, Any]]:
    """Return the recipes by name: the plain merge, and those of each granularity and choice."""
    made = demo_recipes(BASE, [NUMBERS, CODE], PAIRS, settings, seed)
    recipes = {PLAIN: made[PLAIN]}
    for granularity in ("weight", "row"):
        for choice, exclude in (("masked", {}), ("excluded", {"exclude": ROUTERS})):
            recipe = copy.deepcopy(made["somf"])
            recipe["parameters"] |= {"granularity": granularity, **exclude}
            recipes[f"{granularity}-{choice}"] = recipe
    return recipes


def measured_rows(folder: Path, settings: DemoSettings, seed: int) -> list[dict[str, Any]]:
    """Make models and merges of a seed in a folder; return what is measured of each."""
    data = demo_data(seed, train=settings.train, held_out=settings.held_out)
    tokenizer = word_tokenizer(texts(data))
    base = new_mixture(tokenizer, settings, seed)
    make_models(folder, data, tokenizer, base, settings, seed, say=click.echo, quiet=True)
    write_pairs(
        preference_rows(
            data, harmful=settings.harmful_pairs, harmless=settings.harmless_pairs, seed=seed
        ),
        folder,
    )
    recipes = merge_recipes(settings, seed)
    for name, recipe in recipes.items():
        click.echo(f"merging {name}")
        write_recipe(recipe, name, folder / f"{name}.yml")
        run_command(f"mergekit-yaml {name}.yml {name}", folder)
    rows, chosen = [], {}
    for name in (BASE, NUMBERS, CODE, *recipes):
        model = loaded_model(folder / name)
        chosen[name] = routes(model, tokenizer, data, settings)
        scores = measured_scores(Path(name).name, model, tokenizer, data, settings)
        rows.append({"seed": seed, **asdict(scores)})
    for row, found in zip(rows, chosen.values(), strict=True):
        for key, other in (("from_base", BASE), ("from_plain", PLAIN)):
            row[key] = float((found != chosen[other]).any(-1).float().mean())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a markdown table of the means over seeds, in per cent."""
    lines = [f"| model | {' | '.join(MEASURES.values())} |", "|---" * (len(MEASURES) + 1) + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = [f"{100 * mean(row[key] for row in own):.0f} %" for key in MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    count = len({row["seed"] for row in rows})
    return "\n".join([*lines, "", f"Means of {count} seed(s), on held-out prompts.", ""])


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3)
def main(out: Path, seeds: int) -> None:
    """Measure masks with and without the routers and write what was found into --out."""
    settings = DemoSettings()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder, no_model_bars():
            rows += measured_rows(Path(folder), settings, seed)
        content = {**circumstances(), "settings": asdict(settings), "rows": rows}
        (out / "mask_routers.json").write_text(json.dumps(content, indent=1) + "\n")
        (out / "mask_routers.md").write_text(table(rows))


if __name__ == "__main__":
    main()
