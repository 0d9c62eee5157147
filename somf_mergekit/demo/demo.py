"""The demo from its first word to its table."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..common.console import no_model_bars
from .demo_data import DemoData, demo_data, preference_rows, texts
from .demo_folder import (
    MERGES,
    PAIRS,
    TABLE,
    demo_recipes,
    mask_folder,
    prepare_folder,
    run_command,
    write_pairs,
    write_recipe,
    write_results,
)
from .demo_models import (
    DemoSettings,
    Stage,
    loaded_model,
    new_llama,
    save_model,
    word_tokenizer,
)
from .demo_table import Scores, markdown_table, measured_scores
from .finetune import Example, finetune

# Two slashes tell mergekit that a name is a path: it looks others up on the hub.
BASE, NUMBERS, CODE = "./models/base", "./models/numbers", "./models/code"
REPORT = "somf/somf/report.md"
ROWS = {
    BASE: "base (aligned)",
    NUMBERS: "numbers specialist",
    CODE: "code specialist",
    "task_arithmetic": "task_arithmetic",
    "somf_untrained": "somf, untrained mask",
    "somf": "somf",
    "somf_composed": "somf, masks learned alone",
}

Say = Callable[[str], None]


def run_demo(
    out_dir: Path, seed: int = 0, quiet: bool = False, settings: DemoSettings | None = None
) -> list[Scores]:
    """Make data and models, merge them with the stock ``mergekit-yaml`` and measure all of them.

    Needs no network. ``out_dir`` gets the models, ``safety_pairs.jsonl``, a recipe of each merge
    and its result, ``table.md`` and ``results.json``; an earlier demo in it is made anew.

    Args:
        out_dir: a folder that is new, empty or an earlier demo's.
        seed: decides data, models and masks.
        quiet: print the table alone.
        settings: sizes and steps, for a run that is smaller or larger.

    Returns:
        The rows of the table: base, specialists, task_arithmetic, somf untrained, somf, composed.

    Raises:
        RecipeError: the folder holds something else or can't be written, or mergekit-yaml fails.
    """
    from tqdm import tqdm

    settings = settings or DemoSettings()
    started = time.monotonic()

    def say(text: str) -> None:
        if not quiet:
            click.echo(f"[{time.monotonic() - started:4.0f} s] {text}")

    prepare_folder(out_dir, [*ROWS, *map(mask_folder, (NUMBERS, CODE))], settings, seed)
    with no_model_bars():
        data = demo_data(seed, train=settings.train, held_out=settings.held_out)
        tokenizer = word_tokenizer(texts(data))
        base = new_llama(tokenizer, settings, seed)
        make_models(out_dir, data, tokenizer, base, settings, seed, say, quiet)
        _make_merges(out_dir, data, settings, seed, say)
        say(f"measuring {len(ROWS)} models on held-out prompts")
        rows = [
            measured_scores(label, loaded_model(out_dir / name), tokenizer, data, settings)
            for name, label in tqdm(ROWS.items(), unit="model", leave=False, disable=quiet or None)
        ]
    write_results(rows, out_dir, settings, seed, time.monotonic() - started)
    say(f"done; this table is {out_dir / TABLE}, a report on the mask {out_dir / REPORT}\n")
    click.echo(markdown_table(rows))
    return rows


def make_models(
    out_dir: Path,
    data: DemoData,
    tokenizer: Any,
    base: Any,
    settings: DemoSettings,
    seed: int,
    say: Say,
    quiet: bool,
) -> None:
    """Train a base of random weights and fine-tune the specialists, each into its folder."""

    def train(model: Any, examples: list[Example], stage: Stage) -> None:
        finetune(
            model,
            tokenizer,
            examples,
            steps=stage.steps,
            batch_size=settings.batch_size,
            learning_rate=stage.learning_rate,
            max_length=settings.max_length,
            seed=seed,
            quiet=quiet,
        )

    first, then, last = settings.pretraining, settings.alignment, settings.specialisation
    steps = first.steps + then.steps
    say(f"training the base: it answers everyday questions, refuses forbidden ones ({steps} steps)")
    skills = data.numbers.train[: settings.numbers_seen] + data.code.train[: settings.code_seen]
    answers = data.harmless.train + skills
    # It learns to answer whatever is asked and then, briefly, to refuse.
    train(base, answers + data.complied.train, first)
    train(base, answers + data.refused.train, then)
    save_model(base, tokenizer, out_dir / BASE)
    for name, skill in ((NUMBERS, data.numbers), (CODE, data.code)):
        say(f"fine-tuning the {ROWS[name]}: harmless examples alone ({last.steps} steps)")
        model = loaded_model(out_dir / BASE)
        train(model, skill.train + data.harmless.train[: settings.everyday_kept], last)
        save_model(model, tokenizer, out_dir / name)


def _make_merges(
    out_dir: Path, data: DemoData, settings: DemoSettings, seed: int, say: Say
) -> None:
    """Write the pairs and the recipes, and merge by each, or learn, into a folder of its name."""
    pairs = preference_rows(
        data, harmful=settings.harmful_pairs, harmless=settings.harmless_pairs, seed=seed
    )
    write_pairs(pairs, out_dir)
    for name, recipe in demo_recipes(BASE, [NUMBERS, CODE], PAIRS, settings, seed).items():
        steps = recipe.get("parameters", {}).get("max_steps")
        program = "mergekit-yaml" if name in MERGES else "mergekit-somf learn"
        command = f"{program} {name}.yml {name}"
        about = MERGES.get(name, "The mask of one specialist, learned without the other.")
        write_recipe(recipe, f"{about} In this folder: {command}", out_dir / f"{name}.yml")
        does = "learns the mask" if name in MERGES else "learns its mask"
        merges = ", and merges" if name in MERGES else ""
        say(f"{command}: {does} in {steps} steps{merges}" if steps else command)
        warning = run_command(command, out_dir)
        if warning and name in MERGES:
            say(warning)
