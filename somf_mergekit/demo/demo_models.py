"""The demo's models: a small aligned base and two specialists fine-tuned from it."""

from pathlib import Path
from typing import Any

from .demo_data import DemoData, Split
from .demo_settings import DemoSettings, Stage
from .finetune import Example, finetune


def aligned_base(data: DemoData, tokenizer: Any, settings: DemoSettings, seed: int) -> Any:
    """Train a small Llama from scratch that answers everyday questions and refuses forbidden ones.

    It first learns to answer whatever is asked and then, briefly, to refuse.
    """
    model = _new_llama(tokenizer, settings, seed)
    skills = data.numbers.train[: settings.numbers_seen] + data.code.train[: settings.code_seen]
    answers = data.harmless.train + skills
    _train(model, tokenizer, answers + data.complied.train, settings.pretraining, settings, seed)
    _train(model, tokenizer, answers + data.refused.train, settings.alignment, settings, seed)
    return model


def specialist(
    base_dir: Path, skill: Split, data: DemoData, tokenizer: Any, settings: DemoSettings, seed: int
) -> Any:
    """Fine-tune the saved base on one skill and a few everyday questions: nothing harmful."""
    examples = skill.train + data.harmless.train[: settings.everyday_kept]
    model = loaded_model(base_dir)
    _train(model, tokenizer, examples, settings.specialisation, settings, seed)
    return model


def loaded_model(model_dir: Path) -> Any:
    """Return a saved model in float32 and evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def save_model(model: Any, tokenizer: Any, model_dir: Path) -> None:
    """Write a model and its tokenizer as a folder that transformers and mergekit read."""
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def _new_llama(tokenizer: Any, settings: DemoSettings, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    stage: Stage,
    settings: DemoSettings,
    seed: int,
) -> None:
    finetune(
        model,
        tokenizer,
        examples,
        steps=stage.steps,
        batch_size=settings.batch_size,
        learning_rate=stage.learning_rate,
        max_length=settings.max_length,
        seed=seed,
        quiet=True,
    )
