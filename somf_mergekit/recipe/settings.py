"""What a somf recipe may say: every parameter with its type, range, default and help."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .schema import Parameter, parameters_of, pattern_text
from .template_keywords import KeywordText

METHOD_NAME = "somf"
# As a ``patience``: no looks, and no end before the last step.
NEVER = "none"
# What the parameters are about, from the one that is named on.
GROUPS = {
    "safety_dataset": "What is learned from",
    "mask": "The mask and the fusion",
    "objective": "How it is learned",
    "include": "Which tensors get a mask",
    "safety_eval": "What the report measures",
}
# No keys of a recipe: the planner's own for a tensor, with the name of its mask (that of the base's
# tensor), which of an artifact's models a mask is of, and what observes it for the report.
MASK_TENSOR, MASK_MODEL, OBSERVER = "mask_tensor", "mask_model", "observer"
INTERNAL = (MASK_TENSOR, MASK_MODEL, OBSERVER)

# Marks of a parameter, see ``declared.Parameter``.
_MERGE: dict[str, Any] = {"merge": True}
_PER_TENSOR: dict[str, Any] = {"merge": True, "per_tensor": True}
_FOR_MODELS: dict[str, Any] = {"merge": True, "for_models": True}
# Of objectives that take sums over an answer's tokens, where ``dpo_norm`` has means: as published
# (arXiv 2405.09055).
_BETA_OF_SUMS = 0.1


class Settings(BaseModel):
    """The parameters of a somf recipe. mergekit passes them on from ``parameters:``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    safety_dataset: str | None = Field(
        None,
        min_length=1,
        description="Preference pairs the mask is learned on: a hub id, a file (.jsonl, .json, "
        ".csv, .parquet) or a folder. Required unless `mask` is given.",
    )
    safety_split: str = Field("train", min_length=1, description="Split of the dataset.")
    safety_config: str | None = Field(None, description="Configuration (subset) of a hub dataset.")
    safety_samples: int | None = Field(
        None, ge=1, description="How many pairs to use, drawn with `seed`; all where not given."
    )
    held_out_share: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of the pairs that is not learned from but compares the merge with the "
        "plain fusion afterwards: at most 100 pairs, and none where it would be fewer than 5. With "
        "`patience`, half of them choose the mask instead.",
    )
    mask: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=_FOR_MODELS,
        description="A learned mask, used as it is: folder, file, or hub id of a published one, "
        "`org/name` or `org/name@revision`. Of one model, or at the top of all without their own.",
    )
    learn: bool | None = Field(
        None,
        json_schema_extra={"merge": True, "per_model": True},
        description="Whether a model's mask is learned, from where its `mask` is if it has one; "
        "where not given, those without one are learned if there is a `safety_dataset`. A model "
        "with neither is merged without a mask.",
    )
    mask_transfer: bool = Field(
        False,
        json_schema_extra=_FOR_MODELS,
        description="Allow a `mask` that was learned for other models, or on another base: it is "
        "not known to do any good.",
    )
    mask_sharing: Literal["shared", "per_model"] = Field(
        "shared",
        description="`shared`: one mask is learned for all models; `per_model`: one for each, all "
        "together.",
    )
    preset: Literal["paper"] | None = Field(
        None,
        description="`paper`: the published hyper-parameters where the recipe does not set them.",
    )
    fusion: str = Field(
        "task_arithmetic",
        min_length=1,
        json_schema_extra=_MERGE,
        description="The mergekit method that fuses the masked models, any that is registered; its "
        "own parameters keep their meaning.",
    )
    granularity: Literal["weight", "row", "column", "row_column", "head", "tensor"] = Field(
        "row",
        json_schema_extra=_PER_TENSOR,
        description="What one entry of the mask covers: one weight, a row (output), a column "
        "(input), an attention head (rows in other tensors), or the whole tensor; `row_column`: "
        "the product of an entry for the row and one for the column (rows in embeddings).",
    )
    mask_kind: Literal["soft", "binary", "sampled", "bernoulli"] = Field(
        "soft",
        json_schema_extra=_PER_TENSOR,
        description="`soft`: the probability; `binary`: probability > 0.5; `sampled`: one concrete "
        "draw; `bernoulli`: 1 with the probability, else 0, one draw (the published binary mask). "
        "Draws are functions of `seed` and the tensor's name.",
    )
    temperature: float = Field(
        0.5,
        gt=0,
        le=10,
        json_schema_extra=_PER_TENSOR,
        description="Temperature of the concrete samples.",
    )
    mask_noise: Literal["concrete", "none"] = Field(
        "concrete",
        description="`concrete`: learn under a random sample of the mask, drawn anew each step; "
        "`none`: under the expected mask, which a `soft` merge uses.",
    )
    init_logit: float = Field(
        0.0,
        ge=-20,
        le=20,
        json_schema_extra=_PER_TENSOR,
        description="Where every logit of the mask starts.",
    )
    mask_rescale: Literal["mean", "none"] = Field(
        "mean",
        json_schema_extra=_PER_TENSOR,
        description="`mean`: divide the mask by its mean, tensor by tensor; `none`: do not.",
    )
    objective: Literal["dpo", "dpo_norm", "ipo", "hinge", "sft"] = Field(
        "dpo_norm",
        description="What is learned from the pairs: a preference loss (`dpo_norm` is DPO per "
        "token), or `sft`, the likelihood of the safe answers alone (needs no unsafe ones).",
    )
    sft_weight: float = Field(
        0.0, ge=0, le=1000, description="Weight of an `sft` term beside a preference loss."
    )
    utility_dataset: str | None = Field(
        None,
        min_length=1,
        description="Harmless prompts with answers, on which the masked merge is held close to "
        "the unmasked one: a hub id, a file or a folder.",
    )
    utility_split: str = Field("train", min_length=1, description="Split of the utility dataset.")
    utility_config: str | None = Field(None, description="Configuration of a hub utility dataset.")
    utility_samples: int | None = Field(
        None, ge=1, description="How many utility examples to use, drawn with `seed`."
    )
    utility_weight: float = Field(
        1.0, ge=0, le=1000, description="Weight of the utility term, where there is one."
    )
    learning_rate: float = Field(
        0.03,
        gt=0,
        le=100,
        json_schema_extra=_PER_TENSOR,
        description="How far a logit moves in a step, at the schedule's peak.",
    )
    optimizer: Literal["signsgd", "adamw"] = Field(
        "signsgd",
        description="`signsgd`: the learning rate against the gradient's sign; `adamw`: AdamW with "
        "betas 0.9 and 0.999, eps 1e-8, no decay, the gradient's norm cut to 1; it keeps two more "
        "numbers an entry.",
    )
    warmup: float = Field(
        0.08,
        ge=0,
        le=1,
        description="Share of the schedule's steps over which the learning rate rises.",
    )
    schedule_steps: int | None = Field(
        None,
        ge=1,
        description="Steps in which the learning rate rises and falls to 0, where learning is to "
        "end before; the steps that are taken where not given, or fewer.",
    )
    epochs: int = Field(4, ge=1, le=1000, description="Passes over the pairs, at most.")
    max_steps: int | None = Field(
        240, ge=0, description="Optimiser steps, at most; 0 leaves the mask untrained."
    )
    patience: Annotated[int, Field(ge=1)] | Literal["none"] = Field(
        "none",
        description="How many looks in a row without a gain end learning; `none`: all steps are "
        "taken, and nothing is looked at. A look measures the mask on half of the held-out pairs: "
        "how much the merge prefers safe answers beside the plain fusion. A gain is more than one "
        "standard error over the mask kept so far, which is the one that the merge uses.",
    )
    look_every: int = Field(
        10, ge=1, description="Steps from one look to the next, where there is a `patience`."
    )
    batch_size: int = Field(8, ge=1, description="Pairs an optimiser step.")
    beta: float = Field(
        5.0,
        gt=0,
        le=100,
        description="Strength of the pull to the reference; 0.1 under another `objective` than "
        "`dpo_norm` where not given.",
    )
    max_length: int = Field(
        128, ge=8, description="Tokens of a prompt with an answer; longer ones are cut."
    )
    chat_template_kwargs: KeywordText | None = Field(
        None,
        description="Further variables of the chat template wherever it is rendered, a mapping in "
        "quotes: mergekit takes no other mapping for a parameter.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        json_schema_extra=_MERGE,
        description="Decides the order of the pairs and every random draw.",
    )
    reference: Literal["base", "merged", "redrawn"] = Field(
        "merged",
        description="Whose log-probabilities a preference loss compares with: `base`, `merged` "
        "(the merge under the untrained mask), or `redrawn` (the authors': the merge under an "
        "untrained mask drawn anew for every batch).",
    )
    include: str = Field(
        "*",
        json_schema_extra=_MERGE,
        description="Tensors that may get a mask: a name pattern or a list of them (`*` and `?` "
        "match as in a shell; without those, any name that contains it).",
    )
    exclude: str = Field(
        "",
        json_schema_extra=_MERGE,
        description="Tensors that get no mask although `include` matches.",
    )
    safety_eval: str | None = Field(
        None,
        min_length=1,
        description="Harmful prompts, for the report: how many the aligned base, the plain fusion "
        "and the merge refuse. A file, a folder or a hub id, behind which `,config=`, `,split=` "
        "and `,half=` may stand, or the name of a public set such as `strongreject`. For this and "
        "the next three, the plain fusion is written beside the output and deleted again: there "
        "must be room for one more model.",
    )
    harmless_eval: str | None = Field(
        None,
        min_length=1,
        description="Harmless prompts, for the report: how many are refused.",
    )
    pairs_eval: str | None = Field(
        None,
        min_length=1,
        description="Held-out safety pairs, for the report: how often the safe answer is likelier.",
    )
    skill_eval: str | None = Field(
        None,
        min_length=1,
        description="Prompts with right answers, for the report, each set under a name: "
        "`math=FILE,code=FILE`.",
    )

    @property
    def template_keywords(self) -> dict[str, Any]:
        """What ``chat_template_kwargs`` says, as a mapping."""
        return dict(yaml.safe_load(self.chat_template_kwargs or "{}"))

    @model_validator(mode="before")
    @classmethod
    def _with_beta(cls, values: Any) -> Any:
        if values.get("objective", "dpo_norm") != "dpo_norm":
            return {"beta": _BETA_OF_SUMS, **values}
        return values


def parameters() -> list[Parameter]:
    """Return every parameter of a somf recipe, in the order of the documentation."""
    return parameters_of(Settings)


def recipe_settings(config: Any) -> Settings:
    """Return the settings of a checked recipe (``recipe_check.recipe_problems`` found none).

    Args:
        config: a mergekit MergeConfiguration.
    """
    given = dict(config.parameters or {})
    values = {}
    for parameter in parameters():
        if parameter.name in given:
            value = given[parameter.name]
            values[parameter.name] = pattern_text(value) if parameter.is_pattern else value
    # Values that vary per tensor are resolved by mergekit; here their defaults stand in.
    fixed: dict[str, Any] = {
        k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))
    }
    return Settings(**fixed)
