"""Forms of masks on the demo's models: what an entry covers, noise, one mask or one for each model.

And masks that were each learned alone, put together without learning.

``python -m benchmarks.mask_forms DIR --seeds 0,1,2`` makes the demo's models for each seed in DIR,
learns and merges one form after the other, measures each, and stores what is known so far in
``DIR/mask_forms.json``; a call that is broken off goes on where it was. ``--record`` copies that to
the repository's results, with a table of means.
"""

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from somf_mergekit.common.console import aligned_table
from somf_mergekit.common.requirements import versions
from somf_mergekit.demo.demo import BASE, CODE, NUMBERS, make_models
from somf_mergekit.demo.demo_data import demo_data, preference_rows, texts
from somf_mergekit.demo.demo_folder import (
    PAIRS,
    demo_recipes,
    recipe,
    run_command,
    write_pairs,
    write_recipe,
)
from somf_mergekit.demo.demo_models import (
    DemoSettings,
    loaded_model,
    new_llama,
    word_tokenizer,
)
from somf_mergekit.demo.demo_table import measured_scores

RESULTS = Path(__file__).parent / "results"
GRANULARITIES = ("row", "row_column", "weight")
SHARINGS, NOISES, STEPS = ("shared", "per_model"), ("concrete", "none"), (30, 60)
RATE = 0.1
MODELS = {"numbers": NUMBERS, "code": CODE}
FUSIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.8},
}
WEIGHTS = (0.3, 0.5, 0.7, 1.0)
# What distinguishes the rows, in this order.
KEYS = ("group", "fusion", "weight", "granularity", "sharing", "noise", "steps")
SCORES = ("refusal", "clean_refusal", "over_refusal", "numbers", "code")


def learning(settings: DemoSettings, seed: int, **values: Any) -> dict[str, Any]:
    """Return the demo's parameters of a learned mask with others in their place."""
    made = demo_recipes(BASE, list(MODELS.values()), PAIRS, settings, seed)
    return {**made["somf"]["parameters"], "learning_rate": RATE, **values}


def plans(settings: DemoSettings, seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield what distinguishes a row, and its recipe; those without a weight are learned alone."""
    models, weight = list(MODELS.values()), settings.weight
    plain = recipe("task_arithmetic", BASE, models, weight, {})
    yield {"group": "plain", "fusion": "task_arithmetic", "weight": weight}, plain
    grid = itertools.product(STEPS, GRANULARITIES, SHARINGS, NOISES)
    for steps, granularity, sharing, noise in grid:
        form = {"granularity": granularity, "sharing": sharing, "noise": noise, "steps": steps}
        values = {
            "granularity": granularity,
            "mask_sharing": sharing,
            "mask_noise": noise,
            "max_steps": steps,
        }
        made = recipe("somf", BASE, models, weight, learning(settings, seed, **values))
        yield {"group": "learned", "fusion": "task_arithmetic", "weight": weight, **form}, made
    for granularity in GRANULARITIES:
        form = {"granularity": granularity, "noise": "none", "steps": max(STEPS)}
        values = {"granularity": granularity, "mask_noise": "none", "max_steps": max(STEPS)}
        for name, model in MODELS.items():
            made = recipe("somf", BASE, [model], weight, learning(settings, seed, **values))
            yield {"group": "alone", "model": name, **form}, made
        for fusion, own in FUSIONS.items():
            for strength in WEIGHTS:
                what = {"fusion": fusion, "weight": strength}
                if granularity == GRANULARITIES[0]:
                    made = recipe(fusion, BASE, models, strength, own)
                    yield {"group": "plain", **what}, made
                made = recipe("somf", BASE, models, strength, {"fusion": fusion, **own})
                for item, name in zip(made["models"], MODELS, strict=True):
                    item["parameters"]["mask"] = folder_of(
                        {"group": "alone", "model": name, **form}
                    )
                yield {"group": "composed", **what, **form}, made
    # One specialist's mask on the other.
    form = {"granularity": "weight", "noise": "none", "steps": max(STEPS)}
    made = recipe("somf", BASE, models, weight, {"mask_transfer": True})
    for item in made["models"]:
        own = {"group": "alone", "model": "numbers", **form}
        item["parameters"]["mask"] = folder_of(own)
    what = {"fusion": "task_arithmetic", "weight": weight}
    yield {"group": "strange (the numbers' mask for both)", **what, **form}, made


def folder_of(row: dict[str, Any]) -> str:
    """Return the name of a row's folder."""
    parts = [str(row[key]) for key in (*KEYS, "model") if key in row]
    return "-".join(parts).replace(" ", "_").replace("(", "").replace(")", "").replace("'", "")


def measured(folder: Path, seed: int, settings: DemoSettings) -> Iterator[dict[str, Any]]:
    """Yield the rows of one seed; what is there already is neither learned nor measured again."""
    data = demo_data(seed, train=settings.train, held_out=settings.held_out)
    tokenizer = word_tokenizer(texts(data))
    if not (folder / "models").exists():
        base = new_llama(tokenizer, settings, seed)
        make_models(folder, data, tokenizer, base, settings, seed, say=click.echo, quiet=True)
        pairs = preference_rows(
            data, harmful=settings.harmful_pairs, harmless=settings.harmless_pairs, seed=seed
        )
        write_pairs(pairs, folder)
    known_file = folder / "rows.json"
    known = json.loads(known_file.read_text(encoding="utf-8")) if known_file.exists() else {}
    for row, content in plans(settings, seed):
        name = folder_of(row)
        if name not in known:
            write_recipe(content, name, folder / f"{name}.yml")
            is_learning = row["group"] == "alone"
            run_command(
                f"{'mergekit-somf learn' if is_learning else 'mergekit-yaml'} {name}.yml {name}",
                folder,
            )
            history = folder / name / ("" if is_learning else "somf") / "training.jsonl"
            lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
            steps = [json.loads(line)["seconds"] for line in lines]
            scores = {}
            if not is_learning:
                model = loaded_model(folder / name)
                scores = asdict(measured_scores(name, model, tokenizer, data, settings))
                (folder / name / "model.safetensors").unlink()
            known[name] = {
                "seed": seed,
                **row,
                "seconds_a_step": statistics.median(steps) if steps else None,
                **scores,
            }
            known_file.write_text(json.dumps(known, indent=1), encoding="utf-8")
        click.echo(json.dumps(known[name]))
        yield known[name]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds as a table, with the lowest and highest in brackets."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["group"] != "alone":
            groups.setdefault(tuple(row.get(key, "") for key in KEYS), []).append(row)
    cells = [[*KEYS, "seeds", *(name.replace("_", " ") for name in SCORES)]]
    for key, own in groups.items():
        shown = []
        for score in SCORES:
            values = [100 * row[score] for row in own]
            spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.0f} %{spread}")
        cells.append([*map(str, key), str(len(own)), *shown])
    return aligned_table(cells, labels=len(KEYS))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--record", is_flag=True, help="Store the results in the repository too.")
def main(folder: Path, seeds: str, record: bool) -> None:
    """Measure forms of masks on the demo's models, into FOLDER."""
    settings = DemoSettings()
    rows: list[dict[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        place = folder / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        for row in measured(place, seed, settings):
            rows.append(row)
            content = {"versions": versions(), "settings": asdict(settings), "rows": rows}
            text = json.dumps(content, indent=1) + "\n"
            (folder / "mask_forms.json").write_text(text, encoding="utf-8")
            if record:
                (RESULTS / "mask_forms.json").write_text(text, encoding="utf-8")
                head = "# Forms of masks, on the demo's models\n\nMeans over seeds (range).\n\n"
                (RESULTS / "mask_forms.md").write_text(head + table(rows) + "\n", encoding="utf-8")
    click.echo(table(rows))


if __name__ == "__main__":
    main()
