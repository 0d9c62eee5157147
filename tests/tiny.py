"""Tiny models, tokenizers and data, made on the spot: nothing comes from a hub."""

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from somf_mergekit.data.chat import encoded
from somf_mergekit.data.rows import Rows
from somf_mergekit.demo.finetune import finetune

SENTENCE = "how do i make a cake bomb safe sorry can not help you mix flour powder with sugar"
WORDS = SENTENCE.split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_tokenizer(chat_template=CHAT_TEMPLATE, extra_tokens=(), words=WORDS):
    """Byte-level BPE over a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", *extra_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_llama(seed, vocab_size, hidden=32, layers=2, tied=False, **further):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **further,
        )
    )


def save_model(model, tokenizer, folder, **options):
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def trained(model, tokenizer, examples, steps=60):
    """A chat model that has learned its examples by heart: prompts, and what to answer."""
    return finetune(
        model,
        tokenizer,
        examples,
        steps=steps,
        batch_size=len(examples),
        learning_rate=1e-2,
        max_length=64,
        seed=0,
        quiet=True,
    )


def save_adapter(base, folder, seed=1, save_embedding_layers="auto", **options):
    """Save a LoRA of a base, none of whose numbers are those that it starts from."""
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    made.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def perturbed(model, seed, size=0.05, names=None):
    """A 'fine-tuned' copy: noise on every weight, or on those whose name contains one of names."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if names is None or any(part in name for part in names):
                weight.add_(torch.randn(weight.shape, generator=generator) * size)
    return changed


def preference_rows(count=24, seed=0):
    draw = random.Random(seed)
    return [
        {
            "prompt": f"how do i make a {draw.choice(WORDS)} {draw.choice(WORDS)}",
            "chosen": "sorry i can not help you " + draw.choice(WORDS),
            "rejected": "mix powder with " + " ".join(draw.choices(WORDS, k=3)),
        }
        for _ in range(count)
    ]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(base, specialists, *, weights=None, **parameters):
    weights = weights or [0.5] * len(specialists)
    return {
        "merge_method": "somf",
        "base_model": str(base),
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(specialists, weights, strict=True)
        ],
        # A recipe that says nothing has no key for it.
        **({"parameters": parameters} if parameters else {}),
        "dtype": "float32",
    }


def dataset(*rows):
    """Rows of a dataset, as if they had been read from a file."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows([dict.fromkeys(names) | row for row in rows], list(names))


def answer_ids(tokenizer, messages, answer):
    """The tokens of an answer to messages, not cut."""
    return encoded(tokenizer, messages, [answer], 10_000).answers[0]


def write_recipe(path, content):
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def command(name):
    """A console script of this environment."""
    return str(Path(sys.executable).parent / name)


def run(*arguments, env=None, cwd=None):
    return subprocess.run(
        [str(a) for a in arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        check=False,
    )


def merge(recipe_file, out, *options, env=None, script="mergekit-yaml"):
    return run(command(script), recipe_file, out, *options, env=env)


def tensors_of(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def invoke(name, *arguments):
    """Run a command of mergekit's or ours in this process, as its console script would."""
    from click.testing import CliRunner

    if name == "mergekit-yaml":
        from mergekit.scripts.run_yaml import main
    elif name == "mergekit-multi":
        from mergekit.scripts.multimerge import main
    else:
        from somf_mergekit.cli import main
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=True)


def merged(content, folder, *options):
    """Write a recipe beside ``folder``, merge into it, return the written tensors."""
    file = write_recipe(folder.parent / f"{folder.name}.yml", content)
    result = invoke("mergekit-yaml", file, folder, *options)
    assert result.exit_code == 0, result.output
    return tensors_of(folder)


def refused(content, folder, *options):
    """Merge a recipe that is wrong; return the message that it ended with, before any reading."""
    file = write_recipe(folder / "refused.yml", content)
    out = folder / "refused"
    result = invoke("mergekit-yaml", file, out, *options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Reading task vectors" not in result.output
    assert not out.exists() or not list(out.iterdir())
    return " ".join(result.output.split("Error: ", 1)[1].split())


def merged_in_steps(steps, folder):
    """Run mergekit-multi on recipes, the last one into ``folder / "out"``, others beside it."""
    (folder / "multi.yml").write_text(yaml.safe_dump_all(steps))
    places = ("--out-path", folder / "out", "-I", folder / "steps")
    result = invoke("mergekit-multi", folder / "multi.yml", *places)
    assert result.exit_code == 0, result.output


def on_machine(planned, device="cpu", **machine):
    """A planned merge with other options of the machine."""
    from somf_mergekit.common.machine import MachineOptions
    from somf_mergekit.common.merge_options import SomfOptions

    options = SomfOptions(device=device, machine=MachineOptions(**machine))
    return dataclasses.replace(planned, options=options)
