"""Supervised fine-tuning with transformers' Trainer, for the demo and the benchmarks."""

import tempfile
from collections.abc import Sequence
from typing import Any

from ..data.chat import Message, encoded
from ..data.logprobs import IGNORED

Example = tuple[Sequence[Message], str]


def finetune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    seed: int,
    bf16: bool = False,
    quiet: bool = False,
) -> Any:
    """Train ``model`` in place on the answers of ``examples`` (prompts carry no loss).

    AdamW with a cosine schedule and a tenth of the steps as warm-up, examples drawn in an order
    that depends on ``seed`` alone.

    A bar shows the steps on a terminal unless ``quiet``.

    Returns:
        The trained model, in evaluation mode.
    """
    import torch
    from tqdm import tqdm
    from transformers import (
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Bar(TrainerCallback):
        def on_step_end(self, *_given: Any, **_states: Any) -> None:
            bar.update()

    use_cache = model.config.use_cache
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The trainer's own bar stays on the screen, with its logs between.
    bar = tqdm(total=steps, unit="step", leave=False, disable=quiet or None)
    with tempfile.TemporaryDirectory() as scratch, bar:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=max(1, steps // 10),
                lr_scheduler_type="cosine",
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=seed,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[_features(tokenizer, *example, max_length) for example in examples],
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            callbacks=[Bar],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # The trainer switches it off for good, and who loads the model would generate slowly.
    model.config.use_cache = use_cache
    model.eval()
    return model


def _features(
    tokenizer: Any, messages: Sequence[Message], answer: str, max_length: int
) -> dict[str, list[int]]:
    found = encoded(tokenizer, messages, [answer], max_length)
    prompt, (reply,) = found.prompt, found.answers
    return {
        "input_ids": prompt + reply,
        "attention_mask": [1] * (len(prompt) + len(reply)),
        "labels": [IGNORED] * len(prompt) + reply,
    }
