"""A report to read, in markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ..common.console import aligned_table
from ..common.requirements import versions
from ..data.held_out import HeldOut, recorded_held_out, verdict, why_none
from ..evaluate.evaluation_table import circumstances, comparison
from ..learner.looks import LOOK
from ..mask.census import NO_LAYER, Collapse, MaskSummary, grouped, layer_of
from ..prepass.provenance import VALIDATION, recorded_settings
from .content import CurveRow, Report, curve_rows, short_names
from .vectors import VectorSummary

_ORIGINS = {
    "learned": "learned for this merge",
    "reused": "learned by an earlier run of this recipe",
    "given": "given by the recipe",
}
# More tensors than these are named by their kind and layers.
_NAMED = 12


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
    if report.evaluation:
        lines = "\n".join(f"- {line}" for line in circumstances(report.evaluation))
        parts += ["## Before and after", comparison(report.evaluation, level="###"), lines]
    parts += [*_learning(report), *_held_out(report), *_mask(report), *_task_vectors(report)]
    parts += ["## Circumstances", "\n".join(f"- {line}" for line in _circumstances(report))]
    return "\n\n".join(parts) + "\n"


def opening(report: Report) -> str:
    """Return in a paragraph what was merged, and under which mask."""
    settings, count = report.planned.settings, len(report.vectors.models)
    which = "model" if count == 1 else "models"
    origin = f"published as {report.pinned}" if report.pinned else _ORIGINS[report.origin]
    own = [model for model in report.censuses if model]
    how = "with masks of their own" if own else "with one mask"
    if own and len(own) < count:
        how += f", but {count - len(own)} without any"
    return (
        f"The task vectors of {count} {which}, their changes from {report.planned.base_model}, "
        f"were masked {how} ({origin}; used as `{settings.mask_kind}`, "
        f"rescale `{settings.mask_rescale}`) and fused into it by `{settings.fusion}` "
        "([SOMF](https://arxiv.org/abs/2405.09055))."
    )


def given_lines(report: Report) -> Iterator[str]:
    """Yield of each model's mask that was put together with others what it was learned from."""
    for model, given in (report.recorded.get("masks") or {}).items():
        line = learned_from(given["provenance"]) or "it is not recorded from what"
        where = f" (published as {given['pinned']})" if given.get("pinned") else ""
        yield f"The mask of {model}{where} was learned before: {line}."


def learned_from(recorded: Mapping[str, Any]) -> str | None:
    """Return in a line what a mask was learned from, going by its provenance; None if unknown."""
    data, utility = recorded.get("dataset"), recorded.get("utility_dataset") or {}
    if not data:
        return None
    is_sft = (recorded.get("settings") or {}).get("objective") == "sft"
    what = "safe answers" if is_sft else "preference pairs"
    line = f"{recorded['steps']:,} steps on {data['pairs']:,} {what} of {data['source']}"
    if data.get("left_out"):
        line += f" (left out: {data['left_out']})"
    cut = data.get("cut") or {}
    if cut.get("prompts") or cut.get("answers"):
        line += f" ({cut['prompts']:,} prompts and {cut['answers']:,} answers cut to max_length)"
    if utility.get("examples"):
        line += f", held to the plain merge on {utility['examples']:,} answers of "
        line += f"{utility['source']}"
    chosen = recorded.get(VALIDATION)
    if chosen:
        line += f"; the mask is that of step {chosen['mask_step']:,} ({chosen['why_ended']})"
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


def held_out_verdict(report: Report) -> str | None:
    """Return in words where held-out pairs do not speak for the merge; None where they do."""
    return verdict(report.recorded, recorded_settings(report.planned)["mask_kind"])


def summary_table(rows: Sequence[MaskSummary], heading: str) -> str:
    """Return summaries as a markdown table with aligned columns."""
    header = [heading, "entries", "mean", "std", "5 %", "95 %", "> 0.5"]
    return aligned_table([header, *map(_summary_cells, rows)])


def _summary_cells(row: MaskSummary) -> list[str]:
    shares = (row.mean, row.deviation, row.low, row.high)
    return [row.label, f"{row.entries:,}", *(f"{n:.3f}" for n in shares), f"{100 * row.kept:.1f} %"]


def collapse_list(collapses: Sequence[Collapse]) -> str:
    """Return a markdown list of the ways in which masks have collapsed, tensors by name.

    Where they are many, by their kind and layers.
    """
    lines = []
    for collapse in collapses:
        count = len(collapse.tensors)
        names = [f"`{name}`" for name in collapse.tensors]
        shown = ", ".join(names if count <= _NAMED else _by_kind(collapse.tensors))
        counted = f"{count:,} {'tensor' if count == 1 else 'tensors'}"
        lines.append(f"- **{collapse.what}** ({collapse.meaning}), {counted}: {shown}")
    return "\n".join(lines)


def _by_kind(names: Sequence[str]) -> Iterator[str]:
    """Yield many names in few words: a kind of tensor with the layers."""
    for kind, members in grouped(names, "kind").items():
        layers = list(dict.fromkeys(layer_of(name) for name in members))
        if layers == [NO_LAYER]:
            yield f"`{kind}`"
        else:
            yield f"`{kind}` ({'layer' if len(layers) == 1 else 'layers'} {' '.join(layers)})"


def _learning(report: Report) -> Iterator[str]:
    yield "## Learning"
    line = learned_from(report.recorded)
    if line:
        yield f"{line[0].upper()}{line[1:]}."
    yield from given_lines(report)
    rows = curve_rows(report.history)
    if rows:
        yield _curve_table(rows)
        yield (
            "Means over the steps, each on its own pairs and under its own sample of the mask. "
            "Preference accuracy is the share of pairs with a positive margin: the safe answer "
            "gained against the unsafe one since the reference."
        )
    else:
        yield "There is no training curve."
    yield from _looks(report)


def _looks(report: Report) -> Iterator[str]:
    """Yield what the look at the kept mask and the last look showed, nothing without looks."""
    chosen = report.recorded.get(VALIDATION)
    looks = {row["step"]: row[LOOK] for row in report.history if row.get(LOOK)}
    if not chosen or not looks:
        return
    shown = {"kept": chosen["mask_step"], "last": max(looks)}
    header = ["look", "step", "margin", "preference", "error", "divergence"]
    rows = [
        [name, f"{step:,}", *map(_number, looks[step].values())]
        for name, step in shown.items()
        if step in looks
    ]
    yield aligned_table([header, *rows])
    yield (
        f"Of {chosen['looks']:,} looks at the mask, on {chosen['pairs']:,} held-out pairs that are "
        "not reported on: the mean margin in nats a token; how probable it is, by DPO per token, "
        "that the safe answer is preferred (0.5 for the plain merge), with its standard error, or "
        "1 / pairs where that is more; the mean divergence a token from the plain merge."
    )


def _curve_table(rows: Sequence[CurveRow]) -> str:
    """Return the training curve as a table; what no step has is left out."""
    columns: dict[str, list[float | None]] = {
        "loss": [*(row.loss for row in rows)],
        "preference accuracy": [row.accuracy for row in rows],
        "margin": [row.margin for row in rows],
        "utility": [row.utility for row in rows],
    }
    shown = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    cells = [["steps", *shown]]
    for place, row in enumerate(rows):
        steps = f"{row.first}" if row.first == row.last else f"{row.first} to {row.last}"
        cells.append([steps, *(_number(values[place]) for values in shown.values())])
    return aligned_table(cells)


def _held_out(report: Report) -> Iterator[str]:
    yield "## Pairs held out from learning"
    found, doubt = recorded_held_out(report.recorded), held_out_verdict(report)
    if found is None:
        yield f"No pairs tell whether the mask helps: {why_none(report.recorded)}."
        return
    if doubt:
        first, *further = doubt.splitlines()
        yield f"**{first}**"
        yield from further
    yield held_out_table(found)


def held_out_table(found: HeldOut) -> str:
    """Return what held-out pairs show as a table, with a sentence below that explains it."""
    rows = (("plain fusion", found.plain_fusion), ("under the mask", found.merge))
    table = aligned_table(
        [["merge", "preference accuracy", "margin"]]
        + [[label, f"{100 * s.accuracy:.1f} %", _number(s.margin)] for label, s in rows]
    )
    raised = "" if found.raised is None else f" The mask raises that of {found.raised:,} pairs."
    return (
        f"{table}\n\nOn {found.pairs:,} pairs that the mask has not learned from: how often the "
        "safe answer is likelier per token than the unsafe one, and by how many nats a token on "
        "average." + raised
    )


def _mask(report: Report) -> Iterator[str]:
    yield "## What the mask keeps"
    line = mask_line(report)
    yield f"{line[0].upper()}{line[1:]}."
    if not report.censuses:
        return
    for model, census in report.censuses.items():
        if model:
            yield f"### The mask of {model}"
        yield summary_table([*census.groups("kind"), census.total()], "kind")
        yield summary_table(census.groups("layer"), "layer")
    yield (
        "Of the probabilities of a tensor's entries: a soft mask multiplies by the probability, a "
        "binary one keeps what is above 0.5. Under `mask_rescale: mean` both are divided by their "
        "mean over the tensor: then only differences inside a tensor count."
    )
    yield "### Masks that have collapsed"
    for model, census in report.censuses.items():
        found = collapse_list(census.collapses()) or "None."
        yield f"Of {model}:\n\n{found}" if model else found


def _task_vectors(report: Report) -> Iterator[str]:
    groups, labels = report.vectors.kinds(), short_names(report.vectors.models)
    yield "## Task vectors"
    yield "Norms before and after masking, rescaled as the merge uses them:"
    norms = [zip(group.before.norms, group.after.norms, strict=True) for group in groups]
    yield _vector_table(
        groups, labels, [[f"{n:.4g}" for pair in row for n in pair] for row in norms]
    )
    if len(labels) > 1:
        pairs = list(combinations(range(len(labels)), 2))
        cosines = [
            [_number(g.cosine(i, j)) for i, j in pairs for g in (group.before, group.after)]
            for group in groups
        ]
        yield "Cosines between the models' task vectors:"
        yield _vector_table(groups, [f"{labels[i]} and {labels[j]}" for i, j in pairs], cosines)


def _vector_table(
    groups: Sequence[VectorSummary], columns: Sequence[str], cells: Sequence[Sequence[str]]
) -> str:
    """Return a table with a row for each group, and of each column the cells before and after."""
    header = ["kind", *(f"{column}, {when}" for column in columns for when in ("before", "after"))]
    rows = ([group.label, *row] for group, row in zip(groups, cells, strict=True))
    return aligned_table([header, *rows])


def _circumstances(report: Report) -> Iterator[str]:
    learned_with = report.recorded.get("learned_with")
    if learned_with:
        yield "learned with: " + ", ".join(f"{k} {v}" for k, v in learned_with.items())
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    yield f"time: {seconds}"
    if report.peak_memory:
        labels = {"process": "process (with mapped files)", "device": "GPU"}
        peaks = (f"{labels[k]} {v / 2**30:.2f} GiB" for k, v in report.peak_memory.items())
        yield f"peak memory: {', '.join(peaks)}"
    yield "versions: " + ", ".join(f"{name} {number}" for name, number in versions().items())
    settings = {k: v for k, v in recorded_settings(report.planned).items() if v not in (None, "")}
    yield "settings: " + ", ".join(f"{k} {json.dumps(v)}" for k, v in settings.items())


def _number(value: float | None) -> str:
    """Return a number for a table, a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
