"""Greedy answers to chat prompts."""

from collections.abc import Sequence
from typing import Any

import torch

from ..dialogue import Message, prompt_ids


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return the model's greedy answer to each prompt, in the prompts' order.

    Prompts go through in batches of like length, padded at the left.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = max(len(ids[row]) for row in rows)
        padding = [length - len(ids[row]) for row in rows]
        batch = torch.tensor([[pad] * p + ids[row] for p, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (length - p) for p in padding])
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Training leaves a configuration that switches it off, which mergekit hands on.
                use_cache=True,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers
