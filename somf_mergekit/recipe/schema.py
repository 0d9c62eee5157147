"""Parameters of a recipe, as classes of settings declare them, and what is wrong with a value."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import click
from pydantic import BaseModel, TypeAdapter, ValidationError

from ..common.errors import RecipeError


@dataclass(frozen=True)
class Parameter:
    """One parameter of a recipe, as a field of a class of settings declares it.

    Marks in the field's ``json_schema_extra``: ``merge``, what the merge method itself needs;
    ``per_tensor``, what may differ between tensors (filters, gradients over layers);
    ``per_model``, what is said of one model; ``for_models``, what is said of one model, or at the
    top for all that do not say it.
    """

    name: str
    value_type: Any
    default: Any
    help: str
    merge: bool
    per_tensor: bool
    per_model: bool
    for_models: bool = False

    @property
    def is_pattern(self) -> bool:
        """Whether the value is a name pattern or a list of them."""
        return self.name in ("include", "exclude")

    @property
    def is_whole(self) -> bool:
        """Whether the value is a whole number."""
        return TypeAdapter(self.value_type).json_schema().get("type") == "integer"

    @property
    def is_truth(self) -> bool:
        """Whether the value is true or false."""
        return self.value_type in (bool, bool | None)

    @property
    def type_text(self) -> str:
        """The type and range in words, for help and tables."""
        adapter = TypeAdapter(self.value_type).json_schema()
        choices = [c for c in adapter.get("anyOf", [adapter]) if c.get("type") != "null"]
        return " or ".join(_schema_text(choice) for choice in choices)

    @property
    def default_text(self) -> str:
        """The default in words."""
        return "none" if self.default in (None, "") else str(self.default)


def parameters_of(settings: type[BaseModel]) -> list[Parameter]:
    """Return every parameter that a class of settings declares, in its order."""
    found = []
    for name, info in settings.model_fields.items():
        marks = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        # With its constraints attached, a field's type validates a value on its own.
        value_type: Any = info.annotation
        if info.metadata:
            constrained: Any = (value_type, *info.metadata)
            value_type = Annotated[constrained]
        found.append(
            Parameter(
                name=name,
                value_type=value_type,
                default=info.default,
                help=info.description or "",
                merge=bool(marks.get("merge")),
                per_tensor=bool(marks.get("per_tensor")),
                per_model=bool(marks.get("per_model")),
                for_models=bool(marks.get("for_models")),
            )
        )
    return found


def table_rows(parameters: Iterable[Parameter]) -> list[str]:
    """Return parameters as rows of a markdown table: name, type, default, meaning."""
    return [f"| `{p.name}` | {p.type_text} | {p.default_text} | {p.help} |" for p in parameters]


def parameter_list(parameters: Iterable[Parameter], groups: Mapping[str, str]) -> str:
    """Return parameters with their defaults and the first sentence of their help.

    Args:
        parameters: in their order.
        groups: a heading for each that begins a group, by its name.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    heading = ""
    for parameter in parameters:
        heading = groups.get(parameter.name, heading)
        first = parameter.help.split(". ")[0].removesuffix(".")
        rows.setdefault(heading, []).append((parameter.name, f"{first} [{parameter.default_text}]"))
    formatter = click.HelpFormatter(width=100)
    for heading, listed in rows.items():
        with formatter.section(heading):
            formatter.write_dl(listed)
    return formatter.getvalue().strip()


def explained(name: str, parameters: Iterable[Parameter]) -> str:
    """Return all that is known of a parameter: its type, default and help, and where it may stand.

    Raises:
        RecipeError: there is no such parameter.
    """
    known = {parameter.name: parameter for parameter in parameters}
    if name not in known:
        raise RecipeError(f"{name}: unknown parameter{nearest(name, known)}")
    found = known[name]
    where = "It stands in the recipe's top `parameters:`, once for all tensors."
    if found.per_tensor:
        where = "It may differ between tensors, by filters or a gradient over layers."
    rest = click.wrap_text(f"{found.help} {where}", width=100)
    return f"{name}: {found.type_text}; default: {found.default_text}\n{rest}"


def pattern_text(value: Any) -> Any:
    """Return a list of name patterns as one text; any other value as it is."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value


def _schema_text(schema: Mapping[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{c}`" for c in schema.get("enum", [schema.get("const")]))
    names = {"integer": "a whole number", "number": "a number", "string": "text"}
    if schema["type"] == "boolean":
        return "true or false"
    name = names[schema["type"]]
    bounds = [
        f"{sign} {_number_text(schema[key])}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", ">="),
            ("exclusiveMaximum", "<"),
            ("maximum", "<="),
        )
        if key in schema and abs(schema[key]) < 2**62
    ]
    return " ".join([name, " and ".join(bounds)]).strip()


def _number_text(value: float) -> str:
    # Older releases of pydantic write the bounds of a float as floats: 1.0.
    return str(int(value) if value == int(value) else value)


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
    may_be_inside = varies or parameter.per_model or (parameter.for_models and per_model)
    if not (may_be_inside or at_top):
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
            if isinstance(leaf, bool) != parameter.is_truth:
                raise ValueError("a truth value, or none")
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
