"""The tables of results, and the record of how it came about."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("somf-mergekit", "mergekit", "torch", "transformers", "datasets")
MODELS = {
    "published": "as published",
    "aligned": "aligned base",
    "math": "math specialist",
    "code": "code specialist",
    "task_arithmetic": "task_arithmetic 0.5 + 0.5",
    "untrained_sampled": "somf, untrained mask, sampled",
    "somf_soft": "somf, learned mask, soft",
    "somf_binary": "somf, learned mask, binary",
    "dare": "dare_linear 0.3 + 0.3, density 0.8",
    "somf_dare": "the same, somf",
    "ties": "ties 0.4 + 0.4, density 0.2",
    "somf_ties": "the same, somf",
    "somf_row": "somf, one entry a row",
    "somf_column": "somf, one entry a column",
    "somf_head": "somf, one entry a head, else a row",
    "somf_tensor": "somf, one entry a tensor, no rescale",
    "somf_reference_base": "somf, reference base",
    "somf_utility": "the same with a utility term on general answers",
    "somf_rate_0.01": "somf, reference base, learning_rate 0.01",
    "somf_rate_0.3": "somf, reference base, learning_rate 0.3",
    "somf_paper": "somf, preset paper",
}
# The models of each table, with those that they are compared with.
TABLES = {
    "main": list(MODELS)[:8],
    "fusions": ["aligned", "dare", "somf_dare", "ties", "somf_ties"],
    "granularities": [
        "aligned",
        "task_arithmetic",
        "somf_soft",
        "somf_row",
        "somf_column",
        "somf_head",
        "somf_tensor",
    ],
    "settings": [
        "aligned",
        "task_arithmetic",
        "somf_soft",
        "somf_reference_base",
        "somf_utility",
        "somf_rate_0.01",
        "somf_rate_0.3",
        "somf_paper",
    ],
}
HEADINGS = {
    "main": "What a safe merge gives",
    "fusions": "Other fusions, with and without a mask",
    "granularities": "What one entry of the mask covers",
    "settings": "How the mask is learned",
}
COLUMNS = {
    "refusals": ("refusals", "{:.0%}"),
    "over_refusals": ("over-refusals", "{:.0%}"),
    "preference_accuracy": ("preference accuracy", "{:.3f}"),
    "math_loss": ("math loss", "{:.3f}"),
    "code_loss": ("code loss", "{:.3f}"),
}


def markdown_table(rows: dict[str, dict[str, float]]) -> str:
    """Return the measures of models, by folder name, as a markdown table."""
    lines = [
        "| model | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name, measures in rows.items():
        # A measure that an interrupted evaluation has not come to stays open.
        cells = [
            form.format(measures[key]) if key in measures else "not measured"
            for key, (_, form) in COLUMNS.items()
        ]
        lines.append(f"| {MODELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def circumstances() -> dict[str, Any]:
    """Return the versions and the machine that a measurement ran on."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def write_results(
    folder: Path, command: str, settings: dict[str, Any], rows: dict[str, dict[str, float]]
) -> str:
    """Write real_model.json and real_model.md into ``folder`` and return the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = circumstances()
    record = {"command": command, **machine, "settings": settings, "results": rows}
    (folder / "real_model.json").write_text(json.dumps(record, indent=1) + "\n")
    tables = [
        (HEADINGS[title], {name: rows[name] for name in names if name in rows})
        for title, names in TABLES.items()
    ]
    text_tables = [
        f"## {heading}\n\n{markdown_table(found).rstrip()}"
        for heading, found in tables
        if found and (heading == HEADINGS["main"] or set(found) - set(TABLES["main"]))
    ]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    text = [
        "# Safe merging of real specialists",
        f"`{command}`",
        *text_tables,
        _explanation(settings["measuring"]),
        f"Python {machine['python']}, {packages}; {machine['system']}, {machine['processor']}, "
        f"{machine['cores']} cores. All settings and seeds stand in `real_model.json`.",
    ]
    (folder / "real_model.md").write_text("\n\n".join(text) + "\n")
    return "\n\n".join(text_tables) + "\n"


def _explanation(measuring: dict[str, Any]) -> str:
    sentences: Sequence[str] = (
        f"Refusals: share of {measuring['harmful_prompts']} harmful prompts whose greedy answer "
        f"({measuring['max_new_tokens']} tokens) opens with a refusal; over-refusals: the same on "
        f"{measuring['harmless_prompts']} harmless prompts of at most 400 characters.",
        f"Preference accuracy: share of {measuring['pairs']} held-out pairs, of prompts nothing "
        "was trained on, whose safe answer is likelier per token.",
        f"Losses: nats per token of {measuring['skill_answers']} test answers each.",
    )
    return " ".join(sentences)


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "from source"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
