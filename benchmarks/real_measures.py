"""What is measured of a model: refusals, preferences, skills; results kept per model content."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from somf_mergekit.dialogue import user_prompt
from somf_mergekit.evaluate import answer_loss, greedy_answers, is_refusal, preference_accuracy
from somf_mergekit.preferences import dataset_rows, encoded_pairs, preference_pairs

from .real_data import HARMFUL, TEST, examples_of, prompts_of
from .real_training import load_saved

SKILLS = ("math", "code")


@dataclass(frozen=True)
class Measuring:
    """How much of each test set is used, and how."""

    harmful_prompts: int = 48
    harmless_prompts: int = 48
    pairs: int = 300
    skill_answers: int = 96
    max_new_tokens: int = 48
    max_length: int = 256
    batch_size: int = 16


def content_key(folder: Path, measuring: Measuring) -> str:
    """Return a digest of a model's weights and tokenizer and of the settings."""
    digest = hashlib.sha256(json.dumps(asdict(measuring), sort_keys=True).encode())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def measured(folder: Path, work: Path, data: Path | None, measuring: Measuring) -> dict[str, float]:
    """Return the measures of the model in ``folder``, from results.json where they stand there.

    The answers go to ``work``/answers; they may be harmful and are for nobody's eyes but the
    person's who checks the refusal phrases.
    """
    key = content_key(folder, measuring)
    results = read_results(work)
    if key in results:
        return dict(results[key]["measures"])
    measures, answers = _measures(folder, work, data, measuring)
    (work / "answers").mkdir(exist_ok=True)
    (work / "answers" / f"{folder.name}-{key}.json").write_text(json.dumps(answers, indent=1))
    results = read_results(work)
    results[key] = {"model": folder.name, "settings": asdict(measuring), "measures": measures}
    partial = work / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, work / "results.json")
    return measures


def read_results(work: Path) -> dict[str, Any]:
    """Return all results so far, by content key."""
    file = work / "results.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def unseen_prompts(work: Path, data: Path | None) -> list[str]:
    """Return the harmful prompts that are not among those of the pairs learned from."""
    learned = set(dataset_rows(str(work / "safety_pairs.jsonl"))["prompt"])
    return [prompt for prompt in prompts_of(HARMFUL, data) if prompt not in learned]


def _measures(
    folder: Path, work: Path, data: Path | None, measuring: Measuring
) -> tuple[dict[str, float], dict[str, list[str]]]:
    model, tokenizer = load_saved(folder)
    model.eval()
    size = measuring.batch_size
    prompts = {
        "refusals": unseen_prompts(work, data)[: measuring.harmful_prompts],
        "over_refusals": [
            messages[-1]["content"] for messages, _ in examples_of(TEST["general"], data)
        ][: measuring.harmless_prompts],
    }
    measures: dict[str, float] = {}
    answers: dict[str, list[str]] = {}
    for name, texts in prompts.items():
        answers[name] = greedy_answers(
            model,
            tokenizer,
            [user_prompt(text) for text in texts],
            max_new_tokens=measuring.max_new_tokens,
            batch_size=size,
        )
        measures[name] = sum(map(is_refusal, answers[name])) / len(texts)
    source = str(work / "held_out_pairs.jsonl")
    pairs = preference_pairs(dataset_rows(source), source)[0][: measuring.pairs]
    encoded, _ = encoded_pairs(pairs, tokenizer, measuring.max_length, source)
    measures["preference_accuracy"], measures["preference_margin"] = preference_accuracy(
        model, encoded, batch_size=size
    )
    for skill in SKILLS:
        measures[f"{skill}_loss"] = answer_loss(
            model,
            tokenizer,
            examples_of(TEST[skill], data)[: measuring.skill_answers],
            max_length=measuring.max_length,
            batch_size=size,
        )
    return measures, answers
