"""The card of a published mask: whose it is, how it was learned, what it does, how to use it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..common.console import aligned_table
from ..common.errors import RecipeError, printable
from ..data.held_out import recorded_held_out, verdict, why_none
from ..mask.artifact import MaskSet
from ..mask.artifact_files import MASKS_FILE
from ..mask.census import MaskCensus
from ..recipe.settings import METHOD_NAME, parameters
from .report_text import held_out_table, learned_from, summary_table

_TAGS = ("mergekit", METHOD_NAME, "safety", "mask")
# Of the settings, those that say how a mask is learned, whatever the data.
_OF_LEARNING = (
    "fusion",
    "granularity",
    "mask_sharing",
    "mask_noise",
    "temperature",
    "mask_rescale",
    "init_logit",
    "objective",
    "beta",
    "sft_weight",
    "utility_weight",
    "reference",
    "optimizer",
    "learning_rate",
    "batch_size",
    "max_length",
    "seed",
    "include",
    "exclude",
)
# Of the parameters of a merge, those that a learned mask has settled.
_SETTLED = ("mask", "learn", "granularity", "init_logit", "learning_rate")


class _Dataset(BaseModel):
    source: str | None
    split: str | None
    config: str | None
    pairs: int
    held_out: int
    fingerprint: str


class Recorded(BaseModel):
    """What a learned mask records of itself, as far as its card needs it.

    Attributes:
        recipe: it was learned with.
        base_model: the aligned model.
        models: that it was learned on, the base among them, with fingerprints of their contents.
        dataset: it was learned from.
        settings: of the recipe.
        steps: of the optimiser.
        tensors, entries: how many.
    """

    recipe: str
    base_model: str
    models: dict[str, str]
    dataset: _Dataset
    settings: dict[str, Any]
    steps: int
    tensors: int
    entries: int

    @classmethod
    def of(cls, masks: MaskSet) -> "Recorded":
        """Return what a mask records.

        Raises:
            RecipeError: it doesn't say how it was learned.
        """
        try:
            return cls.model_validate(masks.provenance)
        except ValidationError as error:
            missing = sorted({str(one["loc"][0]) for one in error.errors()})
            raise RecipeError(
                f"mask {masks.path} doesn't record how it was learned ({', '.join(missing)}), "
                "which its card would say: publish one that `mergekit-somf learn` or a merge wrote"
            ) from error


def mask_card(masks: MaskSet, name: str, hub_models: Sequence[str]) -> str:
    """Return the card of a mask, in markdown with the hub's metadata before it.

    Args:
        masks: the mask; what it records is shown.
        name: its id on the hub.
        hub_models: of the models that it was learned on, the ids that the hub has.
    """
    found = Recorded.of(masks)
    metadata = {"base_model": list(hub_models)} if hub_models else {}
    front = yaml.safe_dump(
        {**metadata, "library_name": "mergekit", "tags": list(_TAGS)}, sort_keys=False
    )
    parts = [f"---\n{front}---", f"# {name.split('/')[-1]}", _opening(masks, found)]
    parts += ["## Whose mask it is", *_models(found)]
    parts += ["## How it was learned", *_learning(masks.provenance, found)]
    parts += ["## What was measured", *_measured(masks.provenance, found)]
    parts += ["## How to use it", *_usage(found, name)]
    parts += ["## What it keeps"]
    for model, own in masks.each():
        census = MaskCensus(own)
        parts += [f"The mask of {model}:"] if model else []
        parts += [summary_table([*census.groups("kind"), census.total()], "kind")]
    return printable("\n\n".join(parts) + "\n")


def _opening(masks: MaskSet, found: Recorded) -> str:
    stored = "a bit an entry (binary)" if masks.header.packed else "a byte an entry"
    return (
        "A mask to merge fine-tuned language models with, so that the merge is as safe as the "
        "aligned model they come from ([SOMF](https://arxiv.org/abs/2405.09055)). It is for "
        "[mergekit](https://github.com/arcee-ai/mergekit) with the package `somf-mergekit`: each "
        "fine-tuned model's changes are multiplied by it before they are fused. "
        f"{found.entries:,} entries in {found.tensors:,} tensors, {stored}, in `{MASKS_FILE}`; "
        "there are no weights of a model in it."
    )


def _models(found: Recorded) -> Iterator[str]:
    rows = [["model", "role", "fingerprint of its content"]]
    for model in sorted(found.models, key=lambda model: model != found.base_model):
        role = "aligned base" if model == found.base_model else "fine-tuned"
        rows.append([model, role, f"`{found.models[model]}`"])
    yield aligned_table(rows, labels=3)
    yield (
        "It has been learned for these models, and is refused for others, going by their files. A "
        "name without an organisation was a folder."
    )


def _learning(recorded: Mapping[str, Any], found: Recorded) -> Iterator[str]:
    data, line = found.dataset, learned_from(recorded) or ""
    yield f"{line[0].upper()}{line[1:]}."
    config = f", configuration {data.config}" if data.config else ""
    yield (
        f"Data: {data.source}{config}, split {data.split}: {data.pairs:,} pairs, and "
        f"{data.held_out:,} held out; fingerprint `{data.fingerprint}`. None of it is stored here."
    )
    settings = {key: found.settings.get(key) for key in _OF_LEARNING}
    yield aligned_table(
        [["setting", "value"]]
        + [[f"`{key}`", str(value)] for key, value in settings.items() if value not in (None, "")],
        labels=2,
    )


def _measured(recorded: Mapping[str, Any], found: Recorded) -> Iterator[str]:
    held_out = recorded_held_out(recorded)
    if held_out is None:
        yield f"Nothing: {why_none(recorded)}."
        return
    doubt = verdict(recorded, found.settings.get("mask_kind"))
    if doubt:
        yield f"**{doubt.splitlines()[0]}**"
    yield held_out_table(held_out)
    yield "That says little of other prompts: measure a merge before you publish it."


def _usage(found: Recorded, name: str) -> Iterator[str]:
    yield (
        "A recipe for `mergekit-yaml`. Behind the mask's name, `@COMMIT` pins a version. Further "
        "fine-tuned models of the same base may stand beside, each with a mask of its own or none."
    )
    yield f"```yaml\n{used_recipe(found.recipe, name)}```"


def used_recipe(recipe: str, mask: str) -> str:
    """Return the recipe that a mask was learned with as one that uses it, YAML.

    The mask of one model stands under it, so that others can be added.

    Args:
        recipe: the YAML text.
        mask: what it says for the mask.
    """
    content = yaml.safe_load(recipe)
    content = content if isinstance(content, dict) else {"merge_method": METHOD_NAME}
    ours = {parameter.name: parameter.merge for parameter in parameters()}
    kept = {
        key: value
        for key, value in (content.get("parameters") or {}).items()
        if ours.get(key, True) and key not in _SETTLED
    }
    models = content.get("models") or []
    if len(models) == 1 and isinstance(models[0], dict):
        models[0]["parameters"] = {**(models[0].get("parameters") or {}), "mask": mask}
        content["parameters"] = kept
    else:
        content["parameters"] = {"mask": mask, **kept}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
