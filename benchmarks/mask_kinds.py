"""What each kind of mask makes of the mask that the demo has learned.

``python -m benchmarks.mask_kinds DIR``, after ``mergekit-somf demo DIR``.
"""

import copy
import json
from pathlib import Path

import click
import yaml


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Merge the demo's specialists in FOLDER by each kind of mask, and print the table."""
    from somf_mergekit.demo.demo_data import demo_data, texts
    from somf_mergekit.demo.demo_folder import run_command, write_recipe
    from somf_mergekit.demo.demo_models import DemoSettings, loaded_model, word_tokenizer
    from somf_mergekit.demo.demo_table import markdown_table, measured_scores
    from somf_mergekit.mask.masking import MASK_KINDS

    settings = DemoSettings()
    seed = json.loads((folder / "somf/somf/somf.json").read_text(encoding="utf-8"))["seed"]
    data = demo_data(seed, train=settings.train, held_out=settings.held_out)
    tokenizer = word_tokenizer(texts(data))
    learned = yaml.safe_load((folder / "somf.yml").read_text(encoding="utf-8"))
    rows = []
    for kind in MASK_KINDS:
        recipe = copy.deepcopy(learned)
        recipe["parameters"] = {"mask": "somf/somf", "mask_kind": kind, "seed": seed}
        name = f"kind-{kind}"
        write_recipe(recipe, f"The demo's mask, used as `{kind}`.", folder / f"{name}.yml")
        run_command(f"mergekit-yaml {name}.yml {name}", folder)
        rows.append(measured_scores(kind, loaded_model(folder / name), tokenizer, data, settings))
    click.echo(markdown_table(rows))


if __name__ == "__main__":
    main()
