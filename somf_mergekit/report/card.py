"""The merged model's card, and its section that says what was done for its safety."""

import os
from pathlib import Path

from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration

from ..common.files import write_whole
from ..evaluate.evaluation_table import value_table
from .content import Report
from .report_text import given_lines, held_out_verdict, learned_from, mask_line, opening

CARD, TEXT_FILE = "README.md", "report.md"
_BEGIN, _END = "<!-- somf: begin -->", "<!-- somf: end -->"


def write_card(config: MergeConfiguration, text: str, out: Path) -> None:
    """Write mergekit's card of a merge, and its recipe.

    For a folder whose path may be the name of a model there, mergekit would ask the hub, and fail
    where that can't be reached: before it has written a tokenizer.

    Args:
        config: the recipe.
        text: of the recipe.
        out: the folder of the merged model.
    """
    models = [{"model": _named_as_folder(model)} for model in config.referenced_models()]
    base = config.base_model and _named_as_folder(config.base_model)
    shown = MergeConfiguration(merge_method=config.merge_method, base_model=base, models=models)
    card = generate_card(shown, text, os.path.basename(os.path.abspath(out)))
    for name, content in ((CARD, card), ("mergekit_config.yml", text)):
        (out / name).write_text(content, encoding="utf-8")


def _named_as_folder(model: ModelReference) -> ModelReference:
    """Return a model whose paths can't be taken for names on the hub, where they are folders."""

    def named(place: ModelPath) -> ModelPath:
        is_relative = not os.path.isabs(place.path) and os.path.exists(place.path)
        path = os.path.join(os.curdir, place.path) if is_relative else place.path
        return place.model_copy(update={"path": path})

    return model.model_copy(
        update={"model": named(model.model), "lora": model.lora and named(model.lora)}
    )


def write_section(report: Report, folder: Path, out: Path) -> None:
    """Put the report's section into the card in ``out``, in the place of an earlier one.

    Args:
        report: what is shown.
        folder: of report.md, which is linked where it is published with the model.
        out: of the merged model.

    Raises:
        OSError: the card can't be read or written.
    """
    parts = ["## Safety", opening(report), "\n".join(f"- {line}" for line in _mask(report))]
    doubt = held_out_verdict(report)
    if doubt:
        parts.append(f"**{doubt.splitlines()[0]}**")
    if report.evaluation:
        parts += [
            value_table(report.evaluation),
            "In brackets: 95 % bootstrap intervals. The plain fusion is this merge without its "
            "mask.",
        ]
    else:
        parts.append("Refusals and skills were not measured with this merge.")
    inside = Path(os.path.relpath(folder, out))
    if inside.parts[:1] != ("..",):
        parts.append(f"More in the [report]({(inside / TEXT_FILE).as_posix()}).")
    card = out / CARD
    write_whole(card, with_section(card.read_text(encoding="utf-8"), "\n\n".join(parts)))


def _mask(report: Report) -> list[str]:
    """Return what there is to say of a mask, a line each."""
    lines = [f"mask: {mask_line(report)}"]
    learned = learned_from(report.recorded)
    if learned:
        lines.append(f"learned in {learned}")
    lines += given_lines(report)
    collapses = report.census.collapses() if report.census else []
    return [*lines, *(f"{len(c.tensors):,} tensors: {c.what} ({c.meaning})" for c in collapses)]


def with_section(card: str, content: str) -> str:
    """Return a card with ``content`` as our section: at its end, or where one was before."""
    marked = f"{_BEGIN}\n{content}\n{_END}"
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return f"{before}{marked}{after}"
    return f"{card.rstrip()}\n\n{marked}\n"
