"""How far lists of phrases are off on answers that people labelled: pyrit's, read where it is.

    pip install --no-deps pyrit==1.1.0 garak==0.17.1
    python -m benchmarks.judge_error --out benchmarks/results

No text of an answer is written.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.circumstances import circumstances
from somf_mergekit.common.digests import json_digest
from somf_mergekit.common.errors import RecipeError
from somf_mergekit.evaluate.answer_text import (
    OPENING_CHARACTERS,
    REFUSAL_OPENINGS,
    REFUSAL_PHRASES,
    is_refusal,
    refuses,
)
from somf_mergekit.evaluate.packaged_files import GARAK, PYRIT
from somf_mergekit.evaluate.phrase_judges import garak_phrases, has_phrase

FILES = (
    "datasets/scorer_evals/refusal_scorer/refusal.csv",
    "datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
    "datasets/scorer_evals/sample/mini_refusal.csv",
)
WINDOWS = (100, 200, 400, 800)
OURS, THEIRS = "phrases", "garak"
_QUANTILE = 1.96

# Whether people call an answer a refusal, by prompt and answer.
Labelled = dict[tuple[str, str], bool]


def labelled_rows() -> Iterator[tuple[tuple[str, str], bool]]:
    """Yield pyrit's prompts with answers, and their labels.

    Raises:
        RecipeError: pyrit isn't installed, or has them in another form.
    """
    for name in FILES:
        (file,) = PYRIT.files(name)
        with file.open(encoding="utf-8", newline="") as opened:
            lines = (line for line in opened.read().splitlines(keepends=True))
            head = next(line for line in lines if not line.startswith("#"))
            for row in csv.DictReader([head, *lines]):
                if row.get("human_score") not in ("0", "1"):
                    raise RecipeError(f"{PYRIT.text}: {name} has other labels: {PYRIT.remedy}")
                yield (row["objective"], row["assistant_response"]), row["human_score"] == "1"


def interval(part: int, whole: int) -> list[float]:
    """Return the 95 % interval of a share by Wilson's score."""
    share, spread = part / whole, _QUANTILE**2 / whole
    half = _QUANTILE * math.sqrt(share * (1 - share) / whole + spread / (4 * whole))
    return [(share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1)]


def error_of(judge: Callable[[str], bool], labelled: Labelled) -> dict[str, Any]:
    """Return counts, precision and recall of a judge that sees the answer alone."""
    found = {key for key in labelled if judge(key[1])}
    refusing = {key for key, label in labelled.items() if label}
    right = len(found & refusing)
    return {
        "found": len(found),
        "right": right,
        "precision": right / len(found) if found else None,
        "precision_interval": interval(right, len(found)) if found else None,
        "recall": right / len(refusing),
        "recall_interval": interval(right, len(refusing)),
    }


def judge_errors() -> dict[str, Any]:
    """Return the error of each list, on all labelled answers and on those that speak alone."""
    rows = list(labelled_rows())
    labelled = dict(rows)
    if any(labelled[key] != label for key, label in rows):
        raise RecipeError(f"{PYRIT.text}: an answer has two labels: {PYRIT.remedy}")
    phrases = garak_phrases()
    ways: dict[str, Callable[[str], bool]] = {
        OURS: is_refusal,
        THEIRS: lambda answer: has_phrase(phrases, answer),
    }
    for size in WINDOWS:
        ways[f"{OURS}, {size} characters"] = lambda answer, size=size: refuses(answer[:size])
    ways[f"{OURS}, whole answer"] = refuses
    ways[f"{THEIRS}, {OPENING_CHARACTERS} characters"] = lambda answer: has_phrase(
        phrases, answer[:OPENING_CHARACTERS]
    )
    labels = defaultdict(set)
    for (_, answer), label in labelled.items():
        labels[answer].add(label)
    # What is a right answer to one prompt refuses another only by answering something else.
    alone = {key: label for key, label in labelled.items() if not label or len(labels[key[1]]) == 1}
    return {
        "rows": len(rows),
        "answers": len(labelled),
        "refusing": sum(labelled.values()),
        "by_themselves": sum(alone.values()),
        "disagree": sum(ways[OURS](answer) != ways[THEIRS](answer) for _, answer in labelled),
        "lists": {
            OURS: lists_digest(),
            THEIRS: {"phrases": len(phrases), "digest": json_digest(phrases)},
        },
        "judges": {
            name: {"all": error_of(judge, labelled), "by_themselves": error_of(judge, alone)}
            for name, judge in ways.items()
        },
    }


def lists_digest() -> dict[str, Any]:
    """Return how long our own list is, and its digest."""
    own = [*REFUSAL_PHRASES, *REFUSAL_OPENINGS]
    return {"phrases": len(own), "digest": json_digest(own)}


def table(found: dict[str, Any]) -> str:
    """Return the errors as markdown."""

    def share(error: dict[str, Any], which: str) -> str:
        if error[which] is None:
            return "-"
        low, high = error[f"{which}_interval"]
        return f"{100 * error[which]:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"

    lines = [
        "# How far lists of phrases are off",
        "",
        f"{found['answers']} different answers of {found['rows']} rows that people labelled "
        f"({found['packages']['pyrit']}); {found['refusing']} of them refuse. Of these, "
        f"{found['refusing'] - found['by_themselves']} are right answers to another prompt, which "
        f"refuse only by answering something else; the last column is without them.",
        "",
        "| judge | calls refusals | of these right | precision | recall | recall, by themselves |",
        "|---|---|---|---|---|---|",
    ]
    for name, errors in found["judges"].items():
        every, alone = errors["all"], errors["by_themselves"]
        cells = [name, every["found"], every["right"], share(every, "precision")]
        cells += [share(every, "recall"), share(alone, "recall")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`{OURS}` is the list of evaluations, which looks at the first {OPENING_CHARACTERS} "
            f"characters; `{THEIRS}` has the {found['lists'][THEIRS]['phrases']} phrases of "
            f"{found['packages']['garak']}, looked for in the whole answer. The two disagree on "
            f"{found['disagree']} answers. In brackets: 95 % intervals by Wilson's score.",
            "",
        ]
    )


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(out: Path) -> None:
    """Measure the lists and write judge_error.json and judge_error.md into --out."""
    packages = {package.name: package.text for package in (PYRIT, GARAK)}
    found = {"python": circumstances()["python"], "packages": packages, **judge_errors()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "judge_error.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "judge_error.md").write_text(table(found))


if __name__ == "__main__":
    main()
