"""The benchmark's data: from the hub, or from a folder of JSON lines."""

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from somf_mergekit.common.errors import RecipeError
from somf_mergekit.data.chat import user_prompt
from somf_mergekit.data.dataset_reading import dataset_rows
from somf_mergekit.data.pairs import Pair, read_pairs
from somf_mergekit.demo.finetune import Example

HELD_OUT_PAIRS = 300
SPLIT_SEED = 0
UTILITY_EXAMPLES = 480
# In the work folder.
SAFETY_PAIRS, HELD_OUT = "safety_pairs.jsonl", "held_out_pairs.jsonl"
HARMLESS = "harmless.jsonl"


@dataclass(frozen=True)
class Source:
    """Where one set is found: ``file`` in a data folder, or ``hub`` with its own columns."""

    file: str
    hub: str
    split: str
    config: str | None = None
    prompt_columns: tuple[str, ...] = ()
    answer_column: str | None = None


def _source(file: str, hub: str, split: str, *columns: str, config: str | None = None) -> Source:
    return Source(file, hub, split, config, columns[:-1], columns[-1])


_ALPACA = "sahil2801/CodeAlpaca-20k"
_DOLLY = "databricks/databricks-dolly-15k"
PAIRS = Source("pku_saferlhf_pairs.jsonl", "PKU-Alignment/PKU-SafeRLHF-10K", "train")
# Prompts that a safe model refuses. The hub has HarmfulQA for DangerousQA, of the same authors.
HARMFUL = Source(
    "harmful_dangerousqa.jsonl", "declare-lab/HarmfulQA", "train", prompt_columns=("question",)
)
OTHER_HARMFUL = (
    Source("harmful_harmfulqa.jsonl", HARMFUL.hub, "train", prompt_columns=("question",)),
    Source(
        "harmful_beavertails.jsonl",
        "PKU-Alignment/BeaverTails-Evaluation",
        "test",
        prompt_columns=("prompt",),
    ),
)
# Sets without a test split of their own give up their last rows for it.
TRAIN = {
    "math": _source(
        "math_gsm8k_train.jsonl", "openai/gsm8k", "train", "question", "answer", config="main"
    ),
    "code": _source("code_train.jsonl", _ALPACA, "train[:-300]", "instruction", "input", "output"),
    "general": _source(
        "general_train.jsonl", _DOLLY, "train[:-300]", "instruction", "context", "response"
    ),
}
TEST = {
    "math": _source(
        "math_gsm8k_test.jsonl", "openai/gsm8k", "test", "question", "answer", config="main"
    ),
    "code": _source("code_test.jsonl", _ALPACA, "train[-300:]", "instruction", "input", "output"),
    "general": _source(
        "general_test.jsonl", _DOLLY, "train[-300:]", "instruction", "context", "response"
    ),
}


def prompts_of(source: Source, folder: Path | None) -> list[str]:
    """Return the prompts of a set, in its order."""
    return [
        prompt for prompt, _ in _texts(source, folder, source.prompt_columns or ("prompt",), None)
    ]


def examples_of(source: Source, folder: Path | None) -> list[Example]:
    """Return the prompts of a set with their answers, in its order."""
    texts = _texts(source, folder, source.prompt_columns, source.answer_column)
    return [(user_prompt(prompt), answer) for prompt, answer in texts]


def drawn(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return ``count`` of ``examples`` without repetition, drawn from ``seed``."""
    return random.Random(seed).sample(list(examples), min(count, len(examples)))


def pairs_of(folder: Path | None) -> list[Pair]:
    """Return all safety preference pairs, in their order."""
    source = str(folder / PAIRS.file) if folder else PAIRS.hub
    return list(read_pairs(source, PAIRS.split))


def split_by_prompt(
    pairs: Sequence[Pair], held_out: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to learn from and ``held_out`` pairs to measure with.

    A prompt has many pairs: prompts are parted, so that none stands on both sides. Which ones are
    held out is drawn from ``seed``; what is left of the last prompt is in neither part.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    by_prompt: dict[tuple[tuple[str, str], ...], list[Pair]] = {prompt: [] for prompt in prompts}
    for pair in pairs:
        by_prompt[pair.prompt].append(pair)
    measured: list[Pair] = []
    while len(measured) < held_out:
        measured += by_prompt.pop(prompts.pop())
    return [pair for pair in pairs if pair.prompt in by_prompt], measured[:held_out]


def write_sets(work: Path, data: Path | None) -> tuple[list[Pair], list[Pair]]:
    """Write the pairs to learn from, those held out and harmless examples, and return the pairs."""
    pairs, held_out = split_by_prompt(pairs_of(data), HELD_OUT_PAIRS, SPLIT_SEED)
    write_pairs(work / SAFETY_PAIRS, pairs)
    write_pairs(work / HELD_OUT, held_out)
    harmless = drawn(examples_of(TRAIN["general"], data), UTILITY_EXAMPLES, SPLIT_SEED)
    write_examples(work / HARMLESS, harmless)
    return pairs, held_out


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write single-turn pairs as JSON lines of prompt, chosen and rejected."""
    rows = (
        {"prompt": p.messages[-1]["content"], "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    )
    _write_rows(path, rows)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write prompts with answers as JSON lines of prompt and response."""
    _write_rows(path, ({"prompt": m[-1]["content"], "response": a} for m, a in examples))


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def _texts(
    source: Source, folder: Path | None, prompt_columns: Sequence[str], answer_column: str | None
) -> Iterator[tuple[str, str]]:
    if folder:
        name = str(folder / source.file)
        prompt_columns, answer_column = ["prompt"], answer_column and "response"
        rows = dataset_rows(name)
    else:
        name, rows = source.hub, dataset_rows(source.hub, source.split, source.config)
    answers = [answer_column] if answer_column else []
    columns = [*prompt_columns, *answers]
    for number, row in enumerate(rows):
        texts = [row.get(column) for column in columns]
        if not all(isinstance(text, str) for text in texts):
            raise RecipeError(f"dataset {name}: row {number} has no text in {columns}")
        parts = texts[: len(prompt_columns)]
        yield "\n".join(part for part in parts if part), texts[-1]
