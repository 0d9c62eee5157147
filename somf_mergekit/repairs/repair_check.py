"""Say what is wrong with a repair's recipe, as far as its text shows."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ..recipe.blocks import model_blocks, parameter_blocks
from ..recipe.schema import nearest, value_problems
from .catalogue import FINE_TUNED, REPAIRS, ROLE, ROLES, Repair


def repair_problems(config: Any) -> list[str]:
    """Return everything that is wrong with a repair's recipe, a sentence each.

    Args:
        config: a mergekit MergeConfiguration whose merge method is one of REPAIRS.
    """
    repair = REPAIRS[config.merge_method]
    problems = []
    if config.base_model is None:
        problems.append(
            f"base_model is missing: {repair.name} needs the aligned model that the fine-tuned one "
            "comes from"
        )
    own = {parameter.name: parameter for parameter in repair.parameters}
    for place, settings, per_model in parameter_blocks(config):
        for key, value in settings.items():
            where = f"{place}.{key}"
            if key in own:
                at_top = place == "parameters"
                problems += value_problems(own[key], value, where, at_top, per_model)
            else:
                problems.append(
                    f"{where}: unknown parameter{nearest(key, own)}; {repair.name} has "
                    f"{', '.join(own)}"
                )
    for place, items, base in model_blocks(config):
        problems += _role_problems(repair, place, items, base)
    return problems


def _role_problems(repair: Repair, place: str, items: list[Any], base: Any) -> Iterator[str]:
    models = defaultdict(list)
    for item in items:
        role = (item.parameters or {}).get(ROLE, FINE_TUNED)
        if item.model != base:
            models[str(role)].append(str(item.model))
        elif ROLE in (item.parameters or {}):
            yield f"{place}: {base} is base_model, the aligned model; it has no role"
    for role, named in models.items():
        if role in repair.needs and len(named) > 1:
            hint = "; merge them first, in a step of a mergekit-multi file, or name their role"
            yield (
                f"{place}: {', '.join(named)} are all {role}, and {repair.name} takes one such "
                f"model{hint if role == FINE_TUNED else ''}"
            )
        elif role in ROLES and role not in repair.needs:
            yield (
                f"{place}: {repair.name} takes no {role} model ({', '.join(named)}); it takes "
                f"{' and '.join(repair.needs)}"
            )
    if not set(models) <= set(ROLES):
        # Already reported; what it was meant to be is not known.
        return
    for role in repair.needs:
        if role not in models and role not in repair.may_lack:
            how = "" if role == FINE_TUNED else f", with `parameters: {{role: {role}}}`"
            yield f"{place}: no {role} model: {repair.name} needs one beside base_model{how}"
