"""The record of a timing, and its tables."""

import json
from pathlib import Path
from typing import Any

from .circumstances import circumstances

WAYS = {
    "plain_dpo": "plain DPO, all weights by AdamW",
    "lora_dpo": "DPO of a LoRA of rank 16 by PEFT",
    "naive": "mask by autograd, RelaxedBernoulli",
    "resident": "mask by this package, resident engine",
    "streaming": "mask by this package, streaming engine",
    "sharded": "mask by this package, two processes, sharded engine",
    "factored": "mask by this package, factored engine",
    "factored_8bit": "mask by this package, factored engine, base in 8 bits",
    "factored_4bit": "mask by this package, factored engine, base in 4 bits",
}
MERGES = {"task_arithmetic": "task_arithmetic", "somf": "somf with a given mask"}
# A merge takes seconds, which vary with the disk: in turn, and the median counts.
MERGE_RUNS = 5
# The granularity whose records say nothing of it.
FINEST = "weight"


def write_record(
    rows: dict[str, dict[str, Any]], weights: int, model: str, options: dict[str, Any]
) -> str:
    """Write speed-MODEL.json and speed-MODEL.md into ``options["out"]`` and return the tables."""
    parts, left_out = ["speed", Path(model).name], {"out"}
    # Records of before know no other device and no other granularity.
    if options["device"] == "cpu":
        left_out |= {"device", "gpu_memory"}
    else:
        parts.append("gpu")
    if options.get("gpu_memory"):
        parts.append(f"{options['gpu_memory']:g}gib")
    if options["granularity"] == FINEST:
        left_out.add("granularity")
    else:
        parts.append(options["granularity"])
    name = "-".join(parts)
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in options.items() if k not in left_out
    }
    record = {"model": Path(model).name, "weights": weights, "settings": settings}
    record |= circumstances() | _gpu(options["device"])
    place = options["out"] / f"{name}.json"
    earlier = json.loads(place.read_text()) if place.exists() else {}
    known = earlier.pop("results", {})
    rows = {**known, **rows} if earlier == record else rows
    text = "\n\n".join(
        [
            f"# Time and memory: {Path(model).name}",
            *(
                _table(rows, labels, unit, weights)
                for labels, unit in ((WAYS, "a step"), (MERGES, "a merge"))
                if rows.keys() & labels.keys()
            ),
            *_import_line(rows),
            f"{options['batch_size']} pairs of up to {options['max_length']} tokens a step, "
            f"{options['micro_batch']} at once, and a mask with one entry a "
            f"{options['granularity']}; medians of the steps after the first, of merges that of "
            f"{MERGE_RUNS} in turn. Memory is the peak of RssAnon; the model has "
            f"{weights:,} weights.",
        ]
    )
    options["out"].mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({**record, "results": rows}, indent=1) + "\n")
    (options["out"] / f"{name}.md").write_text(text + "\n")
    return text


def _table(rows: dict[str, dict[str, Any]], labels: dict[str, str], unit: str, weights: int) -> str:
    """Return what was measured, with ratios to the first that was."""
    lines = [
        f"| | seconds {unit} | ratio | mask work | peak memory, GiB | ratio | bytes a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    on_gpu = any("peak_gpu_bytes" in row for row in rows.values())
    if on_gpu:
        lines = [lines[0] + " of the GPU, GiB | bytes a weight |", lines[1] + "---|---|"]
    known = next((rows[name] for name in labels if "seconds" in rows.get(name, {})), {})
    for name, label in labels.items():
        row = rows.get(name)
        if not row:
            continue
        if "failed" in row:
            lines.append(f"| {label} | {row['failed']} | | | | | |" + " | |" * on_gpu)
            continue
        seconds, memory = row["seconds"], row["peak_bytes"]
        ratios = [
            f"{row[key] / known[key]:.2f}" if key in known else ""
            for key in ("seconds", "peak_bytes")
        ]
        share = f"{row['mask_seconds'] / seconds:.0%}" if "mask_seconds" in row else ""
        lines.append(
            f"| {label} | {seconds:.{3 if on_gpu else 2}f} | {ratios[0]} | {share} "
            f"| {memory / 2**30:.2f} | {ratios[1]} | {memory / weights:.1f} |"
            + _gpu_memory(row, weights)
        )
    return "\n".join(lines)


def _import_line(rows: dict[str, dict[str, Any]]) -> list[str]:
    if "import" not in rows:
        return []
    with_it, without = (1000 * rows["import"][name] for name in ("with", "without"))
    return [
        f"`import torch`: {with_it:.0f} ms with the registration, {without:.0f} ms without "
        "(processor time, medians of five)."
    ]


def _gpu_memory(row: dict[str, Any], weights: int) -> str:
    taken = row.get("peak_gpu_bytes")
    return f" {taken / 2**30:.2f} | {taken / weights:.1f} |" if taken else ""


def _gpu(device: str) -> dict[str, str]:
    if device == "cpu":
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(device)}
