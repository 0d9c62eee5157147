"""What mergekit is to read in the place of a preset, or of a list of name patterns."""

from typing import Any

from .schema import pattern_text
from .settings import Settings, parameters

# The hyper-parameters of arXiv 2405.09055 and its authors' runs with LoRA: three passes over 5,135
# pairs, 16 a step. Beta is the objective's own, and `preset_values` has what depends on the fusion.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "held_out_share": 0.0,
        "granularity": "weight",
        "mask_kind": "sampled",
        "temperature": 0.5,
        "mask_noise": "concrete",
        "init_logit": 0.0,
        "mask_rescale": "mean",
        "objective": "dpo",
        "reference": "redrawn",
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "warmup": 0.0,
        "schedule_steps": 963,
        "batch_size": 16,
        "epochs": 3,
        "patience": "none",
        "max_length": 1024,
    }
}
# At which of the 963 steps the authors took the mask, by fusion: the sums of rates are 2.8, 1.9,
# 1.0 and 2.9. Fusions that they do not have end with task arithmetic.
PAPER_STEPS = {"task_arithmetic": 300, "ties": 200, "dare_linear": 100, "linear": 321}
# With one fine-tuned model, whatever the fusion: theirs for math and code, a sum of 2.4. For other
# tasks it was taken at 500 to 800 steps, once at a rate of 0.001.
PAPER_SINGLE = {"learning_rate": 0.005, "max_steps": 900}


def preset_values(config: Any) -> dict[str, Any]:
    """Return what the preset that a checked recipe names sets for its fusion and models."""
    given = config.parameters or {}
    if given.get("preset") != "paper":
        return {}
    if len({*config.referenced_models(), config.base_model}) == 2:
        return PRESETS["paper"] | PAPER_SINGLE
    fusion = given.get("fusion", Settings.model_fields["fusion"].default)
    steps = PAPER_STEPS.get(fusion, PAPER_STEPS["task_arithmetic"])
    return {**PRESETS["paper"], "max_steps": steps}


def for_mergekit(config: Any) -> Any:
    """Return a copy of a checked recipe as mergekit is to read it.

    It has a preset's values where it doesn't set its own, and lists of name patterns as one text:
    mergekit takes lists for gradients.
    """
    config = config.model_copy(deep=True)
    given = config.parameters or {}
    for parameter in parameters():
        if parameter.is_pattern and parameter.name in given:
            given[parameter.name] = pattern_text(given[parameter.name])
    for name, value in preset_values(config).items():
        own = given.setdefault(name, value)
        items = own if isinstance(own, list) else [own]
        if items and hasattr(items[-1], "filter"):
            # A tensor that matches no filter is not set by the recipe: it gets the preset's value.
            given[name] = [*items, type(items[-1])(value=value)]
    return config
