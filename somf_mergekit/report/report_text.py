"""A report to read."""

import json
from collections.abc import Iterator

from ..common.console import aligned_table
from ..common.requirements import versions
from ..data.held_out import recorded_held_out, verdict, why_none
from ..evaluate.evaluation_table import circumstances, comparison
from ..prepass.provenance import recorded_settings
from .content import Report, short_names
from .curve import curve_rows
from .mask_tables import collapse_list, cosine_table, curve_table, norm_table, number, summary_table

_ORIGINS = {
    "learned": "learned for this merge",
    "reused": "learned by an earlier run of this recipe",
    "given": "given by the recipe",
}


def markdown(report: Report, figure: str | None) -> str:
    """Return a report as markdown.

    Args:
        report: what it holds.
        figure: the file with its plots, beside the text; None where there are none.
    """
    parts = ["# What this merge did", opening(report)]
    if report.failures:
        parts.append("Missing from this report: " + "; ".join(report.failures) + ".")
    if figure:
        parts.append(f"![training curve, mask and task vectors]({figure})")
    parts += [*_measured(report), *_learning(report), *_held_out(report), *_mask(report)]
    parts += _task_vectors(report)
    parts += ["## Circumstances", "\n".join(f"- {line}" for line in _circumstances(report))]
    return "\n\n".join(parts) + "\n"


def opening(report: Report) -> str:
    """Return in a paragraph what was merged, and under which mask."""
    settings, count = report.planned.settings, len(report.vectors.models)
    which = "model" if count == 1 else "models"
    return (
        f"The task vectors of {count} {which}, their changes from {report.planned.base_model}, "
        f"were masked with one mask ({_ORIGINS[report.origin]}; used as `{settings.mask_kind}`, "
        f"rescale `{settings.mask_rescale}`) and fused into it by `{settings.fusion}` "
        "([SOMF](https://arxiv.org/abs/2405.09055))."
    )


def learned_from(report: Report) -> str | None:
    """Return in a line what the mask was learned from, None where that is not told."""
    data, utility = report.told.get("dataset"), report.told.get("utility_dataset") or {}
    if not data:
        return None
    left_out = f" (left out: {data['left_out']})" if data.get("left_out") else ""
    safe_alone = (report.told.get("settings") or {}).get("objective") == "sft"
    what = "safe answers" if safe_alone else "preference pairs"
    line = (
        f"{report.told['steps']:,} steps on {data['pairs']:,} {what} of {data['source']}{left_out}"
    )
    cut = data.get("cut") or {}
    if cut.get("prompts") or cut.get("answers"):
        line += f" ({cut['prompts']:,} prompts and {cut['answers']:,} answers cut to max_length)"
    if utility.get("examples"):
        line += f", held to the plain merge on {utility['examples']:,} answers of "
        line += f"{utility['source']}"
    return line


def mask_line(report: Report) -> str:
    """Return in a line how the mask is distributed."""
    if report.census is None:
        return "no tensor has a mask"
    total = report.census.total()
    return (
        f"{total.entries:,} entries in {len(report.census.counts):,} tensors ({report.unmasked:,} "
        f"have none): mean probability {total.mean:.3f}, standard deviation {total.deviation:.3f}, "
        f"{100 * total.kept:.1f} % above 0.5"
    )


def _measured(report: Report) -> Iterator[str]:
    if report.evaluation is None:
        return
    yield "## Before and after"
    yield comparison(report.evaluation, level="###")
    yield "\n".join(f"- {line}" for line in circumstances(report.evaluation))


def _learning(report: Report) -> Iterator[str]:
    yield "## Learning"
    line = learned_from(report)
    if line:
        yield f"{line[0].upper()}{line[1:]}."
    rows = curve_rows(report.history)
    if rows:
        yield curve_table(rows)
        yield (
            "Means over the steps, each on its own pairs and under its own sample of the mask. "
            "Preference accuracy is the share of pairs with a positive margin: the safe answer "
            "gained against the unsafe one since the reference."
        )
    else:
        yield "There is no training curve."


def held_out_verdict(report: Report) -> str | None:
    """Return in words where held-out pairs do not speak for the merge; None where they do."""
    return verdict(report.told, recorded_settings(report.planned)["mask_kind"])


def _held_out(report: Report) -> Iterator[str]:
    yield "## Pairs held out from learning"
    found, doubt = recorded_held_out(report.told), held_out_verdict(report)
    if found is None:
        yield f"No pairs tell whether the mask helps: {why_none(report.told)}."
        return
    if doubt:
        first, *further = doubt.splitlines()
        yield f"**{first}**"
        yield from further
    rows = (("plain fusion", found.plain_fusion), ("under the mask", found.merge))
    yield aligned_table(
        [["merge", "preference accuracy", "margin"]]
        + [[label, f"{100 * s.accuracy:.1f} %", number(s.margin)] for label, s in rows]
    )
    raised = "" if found.raised is None else f" The mask raises that of {found.raised:,} pairs."
    yield (
        f"On {found.pairs:,} pairs that the mask has not learned from: how often the safe answer "
        "is likelier per token than the unsafe one, and by how many nats a token on average."
        + raised
    )


def _mask(report: Report) -> Iterator[str]:
    yield "## What the mask keeps"
    line = mask_line(report)
    yield f"{line[0].upper()}{line[1:]}."
    if report.census is None:
        return
    yield summary_table([*report.census.groups("kind"), report.census.total()], "kind")
    yield summary_table(report.census.groups("layer"), "layer")
    yield (
        "Of the probabilities of a tensor's entries: a soft mask multiplies by the probability, a "
        "binary one keeps what is above 0.5. Under `mask_rescale: mean` both are divided by their "
        "mean over the tensor: then only differences inside a tensor count."
    )
    collapses = report.census.collapses()
    yield "### Masks that have collapsed"
    yield collapse_list(collapses) if collapses else "None."


def _task_vectors(report: Report) -> Iterator[str]:
    groups, labels = report.vectors.kinds(), short_names(report.vectors.models)
    yield "## Task vectors"
    yield "Norms before and after masking, rescaled as the merge uses them:"
    yield norm_table(groups, labels)
    if len(labels) > 1:
        yield "Cosines between the models' task vectors:"
        yield cosine_table(groups, labels)


def _circumstances(report: Report) -> Iterator[str]:
    learned_with = report.told.get("learned_with")
    if learned_with:
        yield "learned with: " + ", ".join(f"{k} {v}" for k, v in learned_with.items())
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    yield f"time: {seconds}"
    if report.peak_memory:
        told = {"process": "process (with mapped files)", "device": "GPU"}
        peaks = (f"{told[k]} {v / 2**30:.2f} GiB" for k, v in report.peak_memory.items())
        yield f"peak memory: {', '.join(peaks)}"
    yield "versions: " + ", ".join(f"{name} {number}" for name, number in versions().items())
    settings = {k: v for k, v in recorded_settings(report.planned).items() if v not in (None, "")}
    yield "settings: " + ", ".join(f"{k} {json.dumps(v)}" for k, v in settings.items())
