"""The ways of learning that are compared, each written out: run in a process of its own."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from somf_mergekit.data.encoding import EncodedPair, encoded_pairs
from somf_mergekit.data.logprobs import output_head
from somf_mergekit.data.pairs import read_pairs

from .plain_dpo import dpo_backward, dpo_seconds, log_ratios, micro_batches, wait_for
from .real_training import load_saved
from .speed_models import BASE, RANK, SPECIALISTS, WEIGHT

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Work:
    """What every way does alike.

    Attributes:
        folder: with the models.
        pairs: safety pairs as JSON lines.
        steps: to be timed.
        batch_size: pairs a step.
        micro_batch: pairs that go through the model at once.
        max_length: tokens of a prompt with an answer.
        device: of torch.
    """

    folder: Path
    pairs: Path
    steps: int
    batch_size: int
    micro_batch: int
    max_length: int
    device: str = "cpu"


def plain_dpo(work: Work) -> list[float]:
    """Return the seconds of each step of DPO that trains all weights with AdamW."""
    model, tokenizer = load_saved(work.folder / BASE)
    optimizer = torch.optim.AdamW(model.to(work.device).parameters(), lr=1e-6)
    return dpo_seconds(model, optimizer, list(_batches(work, tokenizer)))


def lora_dpo(work: Work) -> list[float]:
    """Return the seconds of each step of DPO that trains a LoRA of PEFT's with AdamW."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_saved(work.folder / BASE)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapted = get_peft_model(model.to(work.device), config)
    learned = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    return dpo_seconds(adapted.get_base_model(), optimizer, list(_batches(work, tokenizer)))


def naive(work: Work) -> list[float]:
    """Return the seconds of each step of the mask learned by autograd through everything.

    A RelaxedBernoulli over all weights, its sample and the merged weights in the graph, every
    task vector stored, and a second masked model, drawn anew each time, as the reference.
    """
    device = torch.device(work.device)
    masked, reference = (_NaiveModel(work, seed) for seed in (0, 1))
    _, tokenizer = load_saved(work.folder / BASE)
    optimizer = torch.optim.AdamW(masked.logits, lr=0.01)
    batches = list(_batches(work, tokenizer))
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        # One draw a micro-batch: the merged weights are in the graph, which backward frees.
        for part in batch:
            with torch.no_grad():
                reference.draw()
                fixed = log_ratios(reference.model, reference.head, part, device)
            masked.draw()
            dpo_backward(
                log_ratios(masked.model, masked.head, part, device) - fixed, work.batch_size
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return seconds


class _NaiveModel:
    """A model whose weights are results of the mask, as autograd sees them."""

    def __init__(self, work: Work, seed: int):
        torch.manual_seed(seed)
        self.model = load_saved(work.folder / BASE)[0].to(work.device)
        self.model.eval().requires_grad_(False)
        self.head = output_head(self.model)
        saved = [work.folder / name for name in SPECIALISTS if (work.folder / name).exists()]
        others = [load_saved(folder)[0].to(work.device) for folder in saved]
        theirs = [dict(other.named_parameters()) for other in others]
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, weight in module.named_parameters(recurse=False):
                places.setdefault(id(weight), []).append((module, name))
        self.parts = []
        for name, weight in list(self.model.named_parameters()):
            deltas = [other[name].data - weight.data for other in theirs]
            logits = torch.zeros_like(weight).requires_grad_()
            self.parts.append((places[id(weight)], weight.data, deltas, logits))
        for where, *_ in self.parts:
            for module, name in where:
                del module._parameters[name]

    @property
    def logits(self) -> list[Tensor]:
        return [logits for *_, logits in self.parts]

    def draw(self) -> None:
        """Set all weights to the merge under a new sample."""
        temperature = torch.tensor(TEMPERATURE, device=self.parts[0][1].device)
        for where, base, deltas, logits in self.parts:
            mask = torch.distributions.RelaxedBernoulli(temperature, logits=logits).rsample()
            mask = mask / mask.mean()
            weight = base + sum(WEIGHT * delta * mask for delta in deltas)
            for module, name in where:
                setattr(module, name, weight)


def _batches(work: Work, tokenizer: Any) -> Iterator[list[list[EncodedPair]]]:
    source = str(work.pairs)
    count = work.steps * work.batch_size
    pairs = read_pairs(source)[:count]
    encoded, _ = encoded_pairs(pairs, tokenizer, work.max_length, source)
    encoded = (encoded * (count // len(encoded) + 1))[:count]
    for step in range(work.steps):
        batch = encoded[step * work.batch_size : (step + 1) * work.batch_size]
        yield micro_batches(batch, work.micro_batch)
