"""The settings that the ways of the comparison are tuned over."""

from typing import Any

from .compare_recipes import Recipe

# A concrete sample at this temperature is 0 or 1 but for one entry in a hundred.
COLD = 0.01
# What a recipe that sets nothing gets, spelt out: the rows stay what they are when it changes.
DEFAULTS: dict[str, Any] = {
    "granularity": "row",
    "learning_rate": 0.03,
    "objective": "dpo_norm",
    "beta": 5.0,
}
# Of the masks that are learned in a quarter of the steps, about as far.
QUICKLY: dict[str, Any] = {**DEFAULTS, "learning_rate": 0.1}
# The objective of arXiv 2405.09055, which the masks were learned by that show what else matters.
PUBLISHED: dict[str, Any] = {"objective": "dpo", "beta": 0.1}
TASK_ARITHMETIC: tuple[Recipe, ...] = ({"weight": 0.5}, {"weight": 0.4})
# The first of each are the settings of arXiv 2405.09055.
DARE: tuple[Recipe, ...] = tuple(
    {"weight": weight, "density": density}
    for weight, density in ((0.3, 0.8), (0.5, 0.8), (0.4, 0.8), (0.5, 0.5))
)
TIES: tuple[Recipe, ...] = tuple(
    {"weight": weight, "density": density, "normalize": False}
    for weight, density in ((0.4, 0.2), (0.7, 0.2), (1.0, 0.2), (0.5, 0.5))
)
REPAIR_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "resta": tuple({"gamma": gamma} for gamma in (0.5, 0.25, 0.125, 1.0)),
    # The cosines of SmolLM2's weights lie between 0.13 and 0.68, a half of them under 0.46.
    "safe_lora": tuple({"threshold": threshold} for threshold in (0.4, 0.3, 0.5, 0.6)),
    "safemerge": tuple(
        {"threshold": threshold, "alpha": alpha}
        for threshold, alpha in ((0.5, 0.7), (0.5, 0.4), (0.7, 0.7), (0.7, 0.4))
    ),
    "lox": tuple(
        {"alpha": alpha, "rank": rank} for alpha, rank in ((0.5, 8), (1.0, 8), (0.5, 64), (1.0, 64))
    ),
    "lssf": tuple({"alpha": alpha} for alpha in (0.5, 0.25, 0.125, 1.0)),
    # The cosines of its rows: 0.76 to 0.83 in the middle half.
    "nlsr": tuple(
        {"share": share, "threshold": threshold, "beta": beta}
        for share, threshold, beta in (
            (0.2, 0.8, 0.5),
            (0.2, 1.0, 0.0),
            (0.5, 0.8, 0.0),
            (0.5, 0.8, 0.5),
        )
    ),
}


def named(setting: Recipe) -> str:
    """Return the name of a setting, as a table shows it."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    told = {key: value for key, value in setting.items() if key != "normalize"}
    return ", ".join(f"{key.replace('_', ' ')} {text(value)}" for key, value in told.items())
