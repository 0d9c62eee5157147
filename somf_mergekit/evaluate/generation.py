"""Greedy answers to chat prompts."""

from collections.abc import Container, Iterator, Sequence
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
    """Return the model's greedy answer to each prompt, in the prompts' order."""
    answers = [""] * len(prompts)
    for batch in greedy_batches(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    ):
        for row, text in batch.items():
            answers[row] = text
    return answers


def greedy_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[dict[int, str]]:
    """Yield the greedy answers batch by batch, each by its prompt's number.

    Prompts go through in batches of like length, padded at the left. Which prompts share a batch
    depends on all of them: what is computed in parts is what would have been computed at once.

    Args:
        model: of transformers.
        tokenizer: the model's own.
        prompts: as messages.
        max_new_tokens: of an answer.
        batch_size: prompts in a batch.
        done: numbers of prompts that are answered; a batch of such alone is left out.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id) if p is not None), 0)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        if all(row in done for row in rows):
            continue
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
        yield {row: text.strip() for row, text in zip(rows, texts, strict=True)}
