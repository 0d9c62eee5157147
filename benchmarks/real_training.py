"""The benchmark's models: the published one, an aligned base, and specialists that forget it."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from somf_mergekit.data.pairs import Pair
from somf_mergekit.demo.finetune import Example, finetune
from somf_mergekit.evaluate import is_refusal

from .real_data import TRAIN, drawn, examples_of

PUBLISHED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Shares of the aligned base's examples. "safe" are the safe answers of the preference pairs, of
# which one in five refuses; "refusing" are those, for a base that refuses and doesn't only evade.
ALIGNMENT_SHARES = {"refusing": 0.1, "safe": 0.4, "general": 0.2, "math": 0.15, "code": 0.15}


@dataclass(frozen=True)
class Training:
    """How one model is fine-tuned."""

    steps: int
    learning_rate: float
    batch_size: int = 8
    max_length: int = 160
    seed: int = 0
    bf16: bool = True

    @property
    def examples(self) -> int:
        """How many examples are seen, each once."""
        return self.steps * self.batch_size


ALIGNED = Training(steps=110, learning_rate=2e-4, seed=0)
SPECIALIST = Training(steps=80, learning_rate=3e-4, seed=1)


def load_published(source: str) -> tuple[Any, Any]:
    """Return model (float32) and tokenizer of a hub id, a folder, or a folder with a .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted(Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    if not files:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
        return model, AutoTokenizer.from_pretrained(source)
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=files[0].name, quantization_config=GgufConfig(dequantize=True)
    ).float()
    model.is_quantized = False
    model.config._name_or_path = files[0].stem
    return model, AutoTokenizer.from_pretrained(source, gguf_file=files[0].name)


def load_saved(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder, as they were saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for weight in model.parameters():
        # Weights mapped from their file may be dropped from memory and read again at every step.
        weight.data = weight.data.clone()
    return model, AutoTokenizer.from_pretrained(folder)


def save_whole(model: Any, tokenizer: Any, folder: Path, settings: dict[str, Any]) -> None:
    """Write a model folder that appears only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(settings, indent=1) + "\n")
    os.rename(partial, folder)


def is_made(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether ``folder`` holds a model made with ``settings``.

    Raises:
        click.ClickException: it holds one made with others.
    """
    record = folder / "training.json"
    if not record.exists():
        return False
    if json.loads(record.read_text()) != settings:
        raise click.ClickException(
            f"{folder} was made with other settings (see {record.name} in it): remove it, "
            "or name another --work folder"
        )
    return True


def alignment_examples(
    pairs: list[Pair], data: Path | None, count: int, seed: int
) -> list[Example]:
    """Return ``count`` examples in the shares of ALIGNMENT_SHARES."""
    sets = {name: examples_of(source, data) for name, source in TRAIN.items()}
    sets["safe"] = [(pair.messages, pair.chosen) for pair in pairs]
    sets["refusing"] = [(prompt, answer) for prompt, answer in sets["safe"] if is_refusal(answer)]
    mixed: list[Example] = []
    for name, share in ALIGNMENT_SHARES.items():
        mixed += drawn(sets[name], round(share * count), seed)
    return mixed


def make_aligned(
    folder: Path, published: Path, pairs: list[Pair], data: Path | None, training: Training
) -> None:
    """Fine-tune the aligned base from the published model, unless it is there."""
    examples = alignment_examples(pairs, data, training.examples, training.seed)
    note = ", ".join(f"{share:.0%} {name}" for name, share in ALIGNMENT_SHARES.items())
    make_finetuned(folder, published, examples, training, note)


def make_specialist(
    folder: Path, aligned: Path, skill: str, data: Path | None, training: Training
) -> None:
    """Fine-tune a specialist from the aligned base, unless it is there."""
    examples = drawn(examples_of(TRAIN[skill], data), training.examples, training.seed)
    make_finetuned(folder, aligned, examples, training, skill)


def make_published(folder: Path, source: str) -> None:
    """Save the model everything starts from."""
    settings = {"source": Path(source).name if Path(source).exists() else source}
    if not is_made(folder, settings):
        save_whole(*load_published(source), folder, settings)


def make_finetuned(
    folder: Path, parent: Path, examples: list[Example], training: Training, note: str
) -> None:
    """Fine-tune the model in ``parent`` into ``folder``, unless it is there."""
    settings = {"parent": parent.name, "examples": note, **asdict(training)}
    if is_made(folder, settings):
        click.echo(f"{folder.name}: there already")
        return
    click.echo(f"{folder.name}: {training.steps} steps of {training.batch_size} from {parent.name}")
    model, tokenizer = load_saved(parent)
    finetune(
        model,
        tokenizer,
        examples,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        max_length=training.max_length,
        seed=training.seed,
        bf16=training.bf16,
    )
    save_whole(model, tokenizer, folder, settings)
