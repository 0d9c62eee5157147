"""The demo's dials, and its models: a small Llama and a tokenizer of words."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
USER, ASSISTANT = "<user>", "<assistant>"
PUNCTUATION = r"[^\w\s▁]"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One stage of training: optimiser steps and the peak learning rate."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class DemoSettings:
    """The demo's dials.

    Attributes:
        hidden_size, layers, heads: the model's shape.
        pretraining: everyday and forbidden questions are all answered; skills are seen in part.
        alignment: forbidden questions are refused. Short and shallow, as it is found in the
            field: the answers stay in the weights, beneath the refusal.
        specialisation: a skill and some everyday questions, all harmless.
        batch_size: examples in a step of training.
        numbers_seen, code_seen: how many examples of each skill the base sees.
        everyday_kept: how many everyday questions a specialist sees beside its skill.
        weight: the weight of each task vector in the merges.
        harmful_pairs, harmless_pairs: the safety pairs to learn the mask from.
        mask: the optimiser steps and the learning rate of the mask.
        own_mask: of each specialist's own, which is learned alone and under the expected mask.
        mask_batch_size: pairs in a step of the mask.
        mask_sft_weight: of the safe answers' likelihood beside DPO. Without it the preference of
            so small a model is won at the expense of its wording.
        train, held_out: the most examples in a split.
        max_length: tokens of a question with its answer, at most.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    pretraining: Stage = field(default=Stage(600, 2e-3))
    alignment: Stage = field(default=Stage(80, 5e-4))
    specialisation: Stage = field(default=Stage(250, 7e-4))
    batch_size: int = 32
    numbers_seen: int = 600
    code_seen: int = 100
    everyday_kept: int = 200
    weight: float = 0.7
    harmful_pairs: int = 640
    harmless_pairs: int = 960
    mask: Stage = field(default=Stage(90, 0.05))
    own_mask: Stage = field(default=Stage(60, 0.1))
    mask_batch_size: int = 16
    mask_sft_weight: float = 1.0
    train: int = 1200
    held_out: int = 96
    max_length: int = 64


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Return a fast tokenizer that knows every word of ``texts``.

    A word with a blank before it and the same word without one are two tokens, so that text is
    decoded exactly as it was written; each punctuation mark is a token of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(PUNCTUATION), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        texts,
        trainers.WordLevelTrainer(
            special_tokens=[PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


def loaded_model(model_dir: Path) -> Any:
    """Return a saved model in float32 and evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def save_model(model: Any, tokenizer: Any, model_dir: Path) -> None:
    """Write a model and its tokenizer as a folder that transformers and mergekit read."""
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def new_llama(tokenizer: Any, settings: DemoSettings, seed: int) -> Any:
    """Return a small Llama with random weights."""
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
