"""DPO that trains all weights, written out: what a mask is compared with."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from somf_mergekit.common import machine
from somf_mergekit.data.encoding import EncodedPair
from somf_mergekit.data.logprobs import (
    answer_token_log_probs,
    output_head,
    pair_batch,
    pair_length,
    pair_log_probs,
)
from somf_mergekit.learner.engine import autocast_to
from somf_mergekit.learner.objectives import PER_TOKEN, preference_losses

# As published with DPO (arXiv 2305.18290).
BETA = 0.1
# Pairs that go through the model at once, and the most that a gradient's norm may be.
_MICRO_BATCH, _CLIPPED = 4, 1.0


def dpo_seconds(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[list[EncodedPair]]],
    before_step: Callable[[int], object] = lambda step: None,
    objective: str = "dpo",
    beta: float = BETA,
) -> list[float]:
    """Train ``model`` in place and return the seconds of each step.

    The reference is the model as it comes (arXiv 2305.18290): its log-probabilities are computed
    first, which is not in the seconds.

    Args:
        model: of transformers, on any device; its dropout, if any, is switched off.
        optimizer: of its weights.
        batches: of each step, the pairs that go through the model at once.
        before_step: called when the gradients of a step are there, with its number from 0.
        objective: see ``objectives.preference_losses``; ``dpo_norm`` takes means over tokens.
        beta: likewise.
    """
    model.eval()
    head = output_head(model)
    with torch.no_grad():
        reference = [
            [log_ratios(model, head, part, model.device, objective) for part in batch]
            for batch in batches
        ]
    seconds = []
    for step, (batch, fixed) in enumerate(zip(batches, reference, strict=True)):
        start = time.perf_counter()
        count = sum(map(len, batch))
        for part, known in zip(batch, fixed, strict=True):
            found = log_ratios(model, head, part, model.device, objective)
            dpo_backward(found - known, count, objective, beta)
        before_step(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def micro_batches(pairs: Sequence[EncodedPair], size: int) -> list[list[EncodedPair]]:
    """Return the pairs of a step, ``size`` of like length together."""
    ordered = sorted(pairs, key=pair_length)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def log_ratios(
    model: Any,
    head: Any,
    pairs: Sequence[EncodedPair],
    device: torch.device,
    objective: str = "dpo",
) -> Tensor:
    """Return log pi(y+) - log pi(y-) of each pair, (pairs,), by a model on ``device``.

    Of log-probabilities per token where the objective takes those.
    """
    batch = pair_batch(pairs, device)
    with autocast_to(machine.autocast_type(str(device)), device):
        found = pair_log_probs(*answer_token_log_probs(model, head, batch), len(pairs))
    return found.counted(objective in PER_TOKEN).ratios


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dpo_backward(log_ratio: Tensor, count: int, objective: str = "dpo", beta: float = BETA) -> None:
    """Add to the weights' gradients those of a step's loss over ``count`` pairs.

    Args:
        log_ratio: h of some of the step's pairs, see ``objectives.preference_losses``.
        count: of all the step's pairs.
        objective, beta: see there.
    """
    losses, _ = preference_losses(objective, log_ratio, beta)
    (losses.sum() / count).backward()


def batches_of_pairs(source: Path, tokenizer: Any, settings: Any) -> list[list[EncodedPair]]:
    """Return the pairs of each step that a mask learns from, with recipe settings, in its order."""
    from somf_mergekit.data.pairs import read_pairs
    from somf_mergekit.learner.loop import batches
    from somf_mergekit.prepass.learning_data import preference_data

    encoded = preference_data(read_pairs(str(source)), str(source), tokenizer, settings).pairs
    planned = batches(len(encoded), settings, settings.max_steps)
    return [[encoded[row] for row in rows] for rows in planned]


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--pairs", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--seed", type=int, default=0)
@click.option("--learning-rate", type=float, default=1e-5)
@click.option("--batch-size", type=int, default=8)
@click.option("--max-length", type=int, default=128)
@click.option("--max-steps", type=int, default=60)
@click.option("--objective", default="dpo")
def main(model: Path, out: Path, pairs: Path, **given: Any) -> None:
    """Train MODEL into OUT on the pairs, and in the order, that a mask learns from."""
    from somf_mergekit.learner.loop import learning_rate_multiplier
    from somf_mergekit.recipe.settings import Settings

    from .real_training import load_saved, save_whole

    loaded, tokenizer = load_saved(model)
    settings = Settings(**given)
    plan = [micro_batches(b, _MICRO_BATCH) for b in batches_of_pairs(pairs, tokenizer, settings)]
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.0, weight_decay=0.0)

    def before_step(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), _CLIPPED)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_multiplier(
                step, len(plan), settings.warmup
            )

    dpo_seconds(loaded, optimizer, plan, before_step, settings.objective, settings.beta)
    save_whole(loaded, tokenizer, out, given)


if __name__ == "__main__":
    main()
