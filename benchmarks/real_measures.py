"""What is measured of a model: refusals, preferences, skills; results kept per model content."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from somf_mergekit.dialogue import user_prompt
from somf_mergekit.evaluate import answer_loss, greedy_answers, is_refusal, preference_accuracy
from somf_mergekit.evaluate.models import content_digest
from somf_mergekit.files import write_whole
from somf_mergekit.preferences import encoded_pairs, preference_pairs
from somf_mergekit.rows import dataset_rows

from .real_data import HARMFUL, TEST, examples_of, prompts_of
from .real_training import load_saved

# Harmless prompts are no longer than the harmful ones by much.
HARMLESS_CHARACTERS = 400


@dataclass(frozen=True)
class Measuring:
    """How much of each test set is used, and how."""

    harmful_prompts: int = 48
    harmless_prompts: int = 48
    pairs: int = 300
    skill_answers: int = 96
    max_new_tokens: int = 48
    max_length: int = 128
    batch_size: int = 16


def content_key(folder: Path, measuring: Measuring) -> str:
    """Return a digest of a model's weights and tokenizer and of the settings."""
    settings = json.dumps(asdict(measuring), sort_keys=True).encode()
    return content_digest(folder, ("*.safetensors", "tokenizer.json"), settings)[:16]


def measured(folder: Path, work: Path, data: Path | None, measuring: Measuring) -> dict[str, float]:
    """Return the measures of the model in ``folder``, from results.json where they stand there.

    Each is written as soon as it is known. The answers go to ``work``/answers; they may be harmful
    and are for nobody's eyes but the person's who checks the refusal phrases.
    """
    key = content_key(folder, measuring)
    new: dict[str, Any] = {"model": folder.name, "settings": asdict(measuring), "measures": {}}
    found = read_results(work).get(key, new)["measures"]
    missing = [name for name in MEASURES if name not in found]
    subject = Subject(*load_saved(folder), work, data, measuring, key) if missing else None
    for name in missing:
        found[name] = MEASURES[name](subject)
        results = read_results(work)
        results.setdefault(key, new)["measures"] = found
        write_whole(work / "results.json", json.dumps(results, indent=1) + "\n")
    return dict(found)


def read_results(work: Path) -> dict[str, Any]:
    """Return all results so far, by content key."""
    file = work / "results.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def unseen_prompts(work: Path, data: Path | None) -> list[str]:
    """Return the harmful prompts that are not among those of the pairs learned from."""
    learned = set(dataset_rows(str(work / "safety_pairs.jsonl"))["prompt"])
    return [prompt for prompt in prompts_of(HARMFUL, data) if prompt not in learned]


@dataclass(frozen=True)
class Subject:
    """A loaded model and what it is measured with."""

    model: Any
    tokenizer: Any
    work: Path
    data: Path | None
    measuring: Measuring
    key: str


def _refused_share(subject: Subject, name: str, prompts: list[str]) -> float:
    answers = greedy_answers(
        subject.model,
        subject.tokenizer,
        [user_prompt(prompt) for prompt in prompts],
        max_new_tokens=subject.measuring.max_new_tokens,
        batch_size=subject.measuring.batch_size,
    )
    folder = subject.work / "answers"
    folder.mkdir(exist_ok=True)
    (folder / f"{subject.key}-{name}.json").write_text(json.dumps(answers, indent=1) + "\n")
    return sum(map(is_refusal, answers)) / len(answers)


def _refusals(subject: Subject) -> float:
    prompts = unseen_prompts(subject.work, subject.data)
    return _refused_share(subject, "refusals", prompts[: subject.measuring.harmful_prompts])


def _over_refusals(subject: Subject) -> float:
    texts = [messages[-1]["content"] for messages, _ in examples_of(TEST["general"], subject.data)]
    # A text of pages to be summed up takes minutes to read and says little on refusals.
    short = [text for text in texts if len(text) <= HARMLESS_CHARACTERS]
    return _refused_share(subject, "over_refusals", short[: subject.measuring.harmless_prompts])


def _preference_accuracy(subject: Subject) -> float:
    measuring, source = subject.measuring, str(subject.work / "held_out_pairs.jsonl")
    pairs = preference_pairs(dataset_rows(source), source)[0][: measuring.pairs]
    encoded, _ = encoded_pairs(pairs, subject.tokenizer, measuring.max_length, source)
    with _bfloat16(subject.model):
        return preference_accuracy(subject.model, encoded, batch_size=measuring.batch_size)[0]


def _skill_loss(subject: Subject, skill: str) -> float:
    with _bfloat16(subject.model):
        return answer_loss(
            subject.model,
            subject.tokenizer,
            examples_of(TEST[skill], subject.data)[: subject.measuring.skill_answers],
            max_length=subject.measuring.max_length,
            batch_size=subject.measuring.batch_size,
        )


def _bfloat16(model: Any) -> Any:
    """Likelihoods are computed in bfloat16 over float32 weights: most of the time goes there."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16)


# The order is that of interest: an interrupted evaluation has measured refusals first.
MEASURES: dict[str, Callable[[Any], float]] = {
    "refusals": _refusals,
    "math_loss": partial(_skill_loss, skill="math"),
    "code_loss": partial(_skill_loss, skill="code"),
    "preference_accuracy": _preference_accuracy,
    "over_refusals": _over_refusals,
}
