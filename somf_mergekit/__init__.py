"""Safety realignment of merged models for mergekit: the merge method ``somf``.

``MaskSet`` opens learned masks, ``learn(recipe, out_dir)`` learns one, ``register()`` makes
mergekit know ``somf`` where the automatic registration is switched off. ``read_pairs``,
``read_answers`` and ``read_prompts`` return what learning and measuring read of a dataset.
"""

from typing import Any

# torch imports this package (through its entry point) whenever it is imported: names are
# brought in when they are asked for.
_PLACES = {
    "MaskSet": "mask.artifact",
    "RecipeError": "common.errors",
    "learn": "plugin.planner",
    "read_answers": "data.pairs",
    "read_pairs": "data.pairs",
    "read_prompts": "data.pairs",
    "register": "plugin.autoload",
}

__all__ = [
    "MaskSet",
    "RecipeError",
    "learn",
    "read_answers",
    "read_pairs",
    "read_prompts",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
