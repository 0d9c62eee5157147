"""Keys that mergekit would not read as they are meant: unknown ones, and the same one twice."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import BaseModel

from .blocks import plain
from .schema import nearest
from .settings import INTERNAL, parameters

_MERGE_KEY = "tag:yaml.org,2002:merge"


def key_problems(source: str | yaml.Node | Mapping[str, Any], file: str = "") -> list[str]:
    """Return a sentence for each key of a recipe that mergekit would drop without a word.

    Args:
        source: the recipe's YAML text, its node in a longer one, or the mapping in it.
        file: where the text is, for the sentence.
    """
    if isinstance(source, str):
        node = yaml.compose(source, Loader=yaml.SafeLoader)
    elif isinstance(source, yaml.Node):
        node = source
    else:
        node = yaml.representer.Representer().represent_data(plain(source))
    if not isinstance(node, yaml.MappingNode):
        return []
    return list(_Walk(file).problems(node, [MergeConfiguration], ""))


class _Walk:
    """A walk over a recipe's nodes, beside what mergekit reads them as."""

    def __init__(self, file: str):
        self._file = file
        self._seen: set[tuple[int, str]] = set()

    def problems(self, node: yaml.Node, kinds: list[Any], place: str) -> Iterator[str]:
        """Yield what is wrong in ``node``, which mergekit reads as one of ``kinds``."""
        # An alias brings a node a second time, and may bring it into itself.
        known = (id(node), str(kinds))
        if known in self._seen:
            return
        self._seen.add(known)
        if isinstance(node, yaml.SequenceNode):
            items = [kind for sequence in _all_of(kinds, (list, tuple)) for kind in sequence]
            for number, item in enumerate(node.value):
                yield from self.problems(item, items, f"{place}[{number}]")
        elif isinstance(node, yaml.MappingNode):
            yield from self._of_mapping(node, kinds, place)

    def _of_mapping(self, node: yaml.MappingNode, kinds: list[Any], place: str) -> Iterator[str]:
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields: dict[str, list[Any]] = {}
        for model in models:
            for name, info in model.model_fields.items():
                fields.setdefault(name, []).extend(_choices(info.annotation))
        # mergekit knows it and does nothing with it.
        fields.pop("residual_weight", None)
        if MergeConfiguration in models:
            # Of a step of a mergekit-multi file.
            fields["name"] = [str]
        values = [kind for mapping in _all_of(kinds, (dict,)) for kind in mapping]
        first: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE_KEY:
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for item in merged:
                    yield from self.problems(item, kinds, place)
                continue
            key = str(key_node.value)
            where = f"{place}.{key}" if place else key
            if key in first:
                lines = self._at(first[key], key_node)
                yield f"{where}: is there twice, and the first one would be dropped{lines}"
            elif fields and key not in fields and not values:
                yield f"{where}: unknown key{_hint(key, fields, place)}{self._at(key_node)}"
            first[key] = key_node
            yield from self.problems(value, fields.get(key, values), where)

    def _at(self, *nodes: yaml.Node) -> str:
        """Return where nodes stand in the text, empty where there is none."""
        lines = [str(node.start_mark.line + 1) for node in nodes if node.start_mark]
        if not lines:
            return ""
        where = f"line{'s' if len(lines) > 1 else ''} {' and '.join(lines)}"
        return f" ({', '.join(filter(None, [self._file, where]))})"


def _hint(key: str, fields: Iterable[str], place: str) -> str:
    """Return what to write instead of a key that mergekit does not know where it stands."""
    known = _parameter_names() if "parameters" in fields else set()
    if key in known:
        return f"; mergekit reads it under `{place}.parameters`".replace("`.", "`")
    return nearest(key, [*fields, *known])


def _parameter_names() -> set[str]:
    """Return the names of all parameters that a recipe of a registered method may have."""
    methods = registry.registered_methods()
    registered = {spec.name for method in methods for spec in method.spec.parameters}
    return ({parameter.name for parameter in parameters()} | registered) - {*INTERNAL}


def _choices(kind: Any) -> list[Any]:
    """Return the members of a union, or what is none alone."""
    arguments = get_args(kind)
    if not arguments or get_origin(kind) in (list, tuple, dict):
        return [kind]
    return [choice for argument in arguments for choice in _choices(argument)]


def _all_of(kinds: Iterable[Any], containers: tuple[type, ...]) -> Iterator[list[Any]]:
    """Yield what the containers among ``kinds`` hold, of a mapping its values."""
    for kind in kinds:
        if get_origin(kind) in containers:
            yield _choices(get_args(kind)[-1])
