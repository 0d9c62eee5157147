"""The models whose learning is timed: a real one, or random weights of a known shape."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from somf_mergekit.common.machine import FACTORED

from .real_training import is_made, load_published, save_whole

BASE = "base"
SPECIALISTS = ("math", "code")
WEIGHT = 0.5
# Llamas with random weights: what is timed does not depend on what they say.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    # With one specialist: two models of 16 GB each.
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    # SmolLM2-135M's shape, with adapters for specialists.
    "smollm2-adapters": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
}
SHAPES |= {f"{name}-adapters": SHAPES[name] for name in ("tiny", "tinyllama", "llama-8b")}
VOCABULARY = 32_000
_LARGE = "llama-8b"
_ADAPTED = "-adapters"
RANK = 16
# Of a specialist's change, against a weight's usual 0.02.
CHANGE = 1e-3


def specialists_of(source: str) -> tuple[str, ...]:
    """Return the names of the specialists that are merged."""
    return SPECIALISTS[:1] if source.startswith(_LARGE) else SPECIALISTS


def references_of(folder: Path, source: str) -> list[str]:
    """Return what a recipe names the specialists in a folder."""
    base = f"{folder / BASE}+" if source.endswith(_ADAPTED) else ""
    return [base + str(folder / name) for name in specialists_of(source)]


def has_way(source: str, way: str) -> bool:
    """Return whether a mask can be learned for these specialists in one of the ways."""
    is_of_adapters = way.startswith(FACTORED) or way == "lora_dpo"
    return way != "naive" if source.endswith(_ADAPTED) else not is_of_adapters


def make_models(folder: Path, source: str, texts: list[str], device: str = "cpu") -> None:
    """Save a base and its specialists, random changes of it, in bfloat16.

    Args:
        folder: gets a folder of each.
        source: a key of SHAPES, or what ``load_published`` takes.
        texts: a shape's tokenizer is made of them.
        device: of torch, where random weights are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"source": Path(source).name, "change": CHANGE}
    names = (BASE, *specialists_of(source))
    if all(is_made(folder / name, {**settings, "seed": seed}) for seed, name in enumerate(names)):
        return
    model, tokenizer = (
        _random(SHAPES[source], texts, device) if source in SHAPES else load_published(source)
    )
    model = model.to(device, torch.bfloat16)
    if source.endswith(_ADAPTED):
        _save_adapted(folder, names, model, tokenizer, settings)
        return
    original = {name: weight.clone() for name, weight in model.named_parameters()}
    for seed, name in enumerate(names):
        draw = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                change = torch.randn(weight.shape, generator=draw, device=device) * CHANGE
                weight.copy_(original[key] if name == BASE else original[key] + change)
        if not (folder / name).exists():
            save_whole(model, tokenizer, folder / name, {**settings, "seed": seed})


def weight_count(folder: Path) -> int:
    """Return how many weights a model has."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            shapes = (handle.get_slice(name).get_shape() for name in handle.keys())  # noqa: SIM118
            count += sum(math.prod(shape) for shape in shapes)
    return count


def _save_adapted(
    folder: Path, names: Sequence[str], model: Any, tokenizer: Any, settings: dict[str, Any]
) -> None:
    """Save a base, and adapters of its linear layers."""
    from peft import LoraConfig, get_peft_model

    if not (folder / BASE).exists():
        save_whole(model, tokenizer, folder / BASE, {**settings, "seed": 0})
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    for seed, name in enumerate(names[1:], 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_" in key:
                    weight.normal_(std=(CHANGE / RANK**0.5) ** 0.5)
        if not (folder / name).exists():
            save_whole(adapted, tokenizer, folder / name, {**settings, "seed": seed})


def _random(shape: dict[str, Any], texts: list[str], device: str) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, **shape}
    config = LlamaConfig(max_position_embeddings=2048, dtype=torch.bfloat16, **size)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    tokenizer = _tokenizer(texts)
    # Every row of the embeddings has a token: else they would be cut.
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(size["vocab_size"] - len(tokenizer))])
    return model, tokenizer


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
