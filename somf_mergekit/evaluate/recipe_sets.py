"""What a recipe asks its merge to be measured on."""

from dataclasses import replace
from typing import Any

from ..recipe.settings import Settings
from .sets import EvaluationSets, read_sets

_OPTIONS_OF_A_SOURCE = ("config", "split")


def sets_of_recipe(settings: Settings) -> tuple[EvaluationSets, list[str]]:
    """Return what a recipe asks to be measured on, and what is wrong with it, a sentence each."""
    skills, problems = named_sources(settings.skill_eval or "")
    asked: dict[str, dict[str, Any]] = {
        "safety_eval": {"harmful": settings.safety_eval},
        "harmless_eval": {"harmless": settings.harmless_eval},
        "pairs_eval": {"pairs": settings.pairs_eval},
        "skill_eval": {"skills": skills},
    }
    found: dict[str, EvaluationSets] = {}
    problems = [f"parameters.skill_eval: {problem}" for problem in problems]
    for key, sources in asked.items():
        found[key], unread = read_sets(**sources)
        wrong = [*unread, *found[key].problems()]
        problems += [f"parameters.{key}: {problem}" for problem in wrong]
    return (
        replace(
            found["skill_eval"],
            harmful=found["safety_eval"].harmful,
            harmless=found["harmless_eval"].harmless,
            pairs=found["pairs_eval"].pairs,
            told={name: text for sets in found.values() for name, text in sets.told.items()},
        ),
        problems,
    )


def named_sources(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the names and sources in ``math=FILE,code=ID,split=test``, and what is wrong.

    What follows a comma without a name of its own belongs to the source before it.
    """
    found: list[tuple[str, str]] = []
    for part in filter(str.strip, text.split(",")):
        name, equals, source = (piece.strip() for piece in part.partition("="))
        if found and (not equals or name in _OPTIONS_OF_A_SOURCE):
            found[-1] = (found[-1][0], f"{found[-1][1]},{part.strip()}")
        elif name and source:
            found.append((name, source))
        else:
            return [], [f"{part.strip()!r} is not NAME=FILE; several stand with commas between"]
    return found, []
