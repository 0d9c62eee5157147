"""Greedy answers to chat prompts."""

from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch

from ..data.chat import AS_GIVEN, Message, prompt_ids
from ..data.rendering import Rendering, begins_thought, ends_thought, opens_thought


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return the model's greedy answer to each prompt, in the prompts' order.

    It is empty where the model never leaves its thought; see ``greedy_batches``.
    """
    answers = [""] * len(prompts)
    for batch in greedy_batches(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    ):
        for row, text in batch.items():
            answers[row] = text or ""
    return answers


def greedy_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    done: Container[int] = (),
    how: Rendering = AS_GIVEN,
) -> Iterator[dict[int, str | None]]:
    """Yield the greedy answers batch by batch, each by its prompt's number.

    An answer is what comes after the model's thought, None where it never leaves that.

    Prompts go through in batches of like length, padded at the left. Which prompts share a batch
    depends on all of them: what is computed in parts is what would have been computed at once.

    Args:
        model, tokenizer: of transformers.
        prompts: as messages.
        max_new_tokens, batch_size: of an answer; prompts in a batch.
        done: numbers of prompts that are answered; a batch of such alone is left out.
        how: the chat template is rendered.
    """
    ids = [prompt_ids(tokenizer, prompt, how) for prompt in prompts]
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
        yield {
            row: _after_thought(tokenizer, tokens, opens_thought(tokenizer, prompts[row], how))
            for row, tokens in zip(rows, output[:, length:].tolist(), strict=True)
        }


def _after_thought(tokenizer: Any, ids: list[int], is_opened: bool) -> str | None:
    """Return the text of what a model wrote after its thought, None where that never ends.

    Args:
        tokenizer: the model's own.
        ids: what it wrote.
        is_opened: whether the prompt has opened a thought.
    """
    whole = tokenizer.decode(ids)
    thought = 0
    if ends_thought(whole):
        # The end of a thought may be special tokens, which are in no answer's text.
        thought = bisect_left(
            range(len(ids)), True, key=lambda count: ends_thought(tokenizer.decode(ids[:count]))
        )
    elif is_opened or begins_thought(whole):
        return None
    return str(tokenizer.decode(ids[thought:], skip_special_tokens=True)).strip()
