"""The models whose learning is timed: a real one, or random weights of a known shape."""

from pathlib import Path
from typing import Any

import torch

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
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = 32_000
# Of a specialist's change, against a weight's usual 0.02.
CHANGE = 1e-3


def make_models(folder: Path, source: str, texts: list[str]) -> None:
    """Save a base and two specialists, random changes of it, in bfloat16.

    Args:
        folder: gets a folder of each.
        source: a key of SHAPES, or what ``load_published`` takes.
        texts: a shape's tokenizer is made of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"source": Path(source).name, "change": CHANGE}
    names = (BASE, *SPECIALISTS)
    if all(is_made(folder / name, {**settings, "seed": seed}) for seed, name in enumerate(names)):
        return
    model, tokenizer = (
        _random(SHAPES[source], texts) if source in SHAPES else load_published(source)
    )
    model = model.to(torch.bfloat16)
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    for seed, name in enumerate(names):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                change = torch.randn(weight.shape, generator=draw) * CHANGE
                weight.copy_(kept[key] if name == BASE else kept[key] + change)
        if not (folder / name).exists():
            save_whole(model, tokenizer, folder / name, {**settings, "seed": seed})


def _random(shape: dict[str, Any], texts: list[str]) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **shape)
    return LlamaForCausalLM(config), _tokenizer(texts)


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
