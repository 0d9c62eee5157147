"""Say what is wrong with the values that a recipe gives to this package's own parameters."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .schema import Parameter, pattern_text


def value_problems(
    parameter: Parameter, value: Any, where: str, at_top: bool, per_model: bool
) -> Iterator[str]:
    """Yield what is wrong with a parameter's value, a sentence each.

    Args:
        parameter: what the recipe may say.
        value: what it says; a filter, a gradient or a list of them where that is allowed.
        where: the key, for the sentence.
        at_top: whether it stands in the recipe's top ``parameters:``.
        per_model: whether it stands under a single model.
    """
    if parameter.is_pattern:
        value = pattern_text(value)
    varies = parameter.per_tensor
    if parameter.per_model and not per_model:
        yield f"{where}: is said of one model; move it to the `parameters:` of that model"
        return
    if not (varies or parameter.per_model or at_top):
        yield f"{where}: belongs to the recipe as a whole; move it to the top `parameters:`"
        return
    if not varies and not isinstance(value, (bool, int, float, str)):
        yield f"{where}: takes one value for all tensors, no list and no filter"
        return
    if varies and per_model:
        yield f"{where}: all models share one value; move it out of the model"
        return
    if parameter.is_whole and any(isinstance(item, list) for item in _settings(value)):
        yield f"{where}: whole numbers have no values between; use filters, not a gradient"
        return
    adapter = TypeAdapter(parameter.value_type)
    for leaf in leaves(value):
        try:
            # pydantic takes true for 1; 1e-3, which YAML reads as text, is a number all the same.
            if isinstance(leaf, bool):
                raise ValueError("a truth value")
            adapter.validate_python(leaf)
        except (ValidationError, ValueError):
            yield f"{where}: {leaf!r} is not {parameter.type_text}"


def leaves(value: Any) -> Iterator[Any]:
    """Yield each single value in a setting of mergekit: in its filters and gradients."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "filter"):
        yield from leaves(value.value)
    else:
        yield value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint at the most similar of the known names, empty where none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _settings(value: Any) -> list[Any]:
    """Return what a setting gives to the tensors of each of its filters: a value or a gradient."""
    given = value if isinstance(value, list) else [value]
    if any(hasattr(item, "filter") for item in given):
        return [getattr(item, "value", item) for item in given]
    return [value]
