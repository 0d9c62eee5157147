"""Recipes of the merges that are compared, and how a model comes about by them."""

from dataclasses import dataclass
from typing import Any

Recipe = dict[str, Any]

# A comparison of merges: the specialists that are merged, and the plain merge that others are
# measured against (0.5 each sums to 1; 0.3 each for three as published in arXiv 2405.09055).
GROUPS = {"two": ("math", "code"), "three": ("math", "code", "general")}
REFERENCE_WEIGHT = {"two": 0.5, "three": 0.3}
# What stands in a recipe for a file or folder, beside the names of prepared models.
MASK, MERGED, PAIRS, UTILITY = "@mask", "@merged", "@pairs", "@utility"


@dataclass(frozen=True)
class Making:
    """How a model comes about; names that begin with @ stand for folders and files.

    Attributes:
        model: a prepared model as it is; nothing is made.
        learns: recipe of the mask that the merges know as @mask.
        merges: recipes, one after the other; @merged is what the one before made.
        dpo: settings of DPO on the last merge.
        trained: prepared models whose training is part of the method's cost.
        reuses: whether the mask was learned for another merge: learning is no cost of this one.
    """

    model: str | None = None
    learns: Recipe | None = None
    merges: tuple[Recipe, ...] = ()
    dpo: dict[str, Any] | None = None
    trained: tuple[str, ...] = ()
    reuses: bool = False


def reference_merge() -> Recipe:
    """Return the plain merge of two that DPO and the repairs start from."""
    return recipe("task_arithmetic", GROUPS["two"], REFERENCE_WEIGHT["two"])


def repair(method: str, roles: dict[str, str], parameters: dict[str, Any]) -> Recipe:
    """Return the recipe of a repair of @merged.

    Args:
        method: of the repair.
        roles: the other models' names by their role.
        parameters: of the repair.
    """
    others = [{"model": model, "parameters": {"role": role}} for role, model in roles.items()]
    return {
        "merge_method": method,
        "base_model": "@aligned",
        "models": [{"model": MERGED}, *others],
        "parameters": dict(parameters),
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }


def recipe(method: str, models: tuple[str, ...], weight: float, **parameters: Any) -> Recipe:
    """Return the recipe of a merge of prepared models, each with the same weight."""
    content: Recipe = {
        "merge_method": method,
        "base_model": "@aligned",
        "models": [{"model": f"@{name}", "parameters": {"weight": weight}} for name in models],
        "dtype": "float32",
        "tokenizer": {"source": "base"},
    }
    return content | ({"parameters": parameters} if parameters else {})
