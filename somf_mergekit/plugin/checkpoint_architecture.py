"""Architectures read from the checkpoints, where mergekit's would lose or rename tensors."""

import re
from collections import Counter
from collections.abc import Collection

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    get_architecture_info,
)
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from ..common.errors import log_traceback
from ..common.model_classes import ModelClass, model_class

# A layer's number in a name, as mergekit finds it.
_NUMBER = re.compile(r"\.(\d+)\.")


class StoredModule(ModuleArchitecture):
    """The tensors of a checkpoint under the names that they are stored under.

    Layers need not be alike: what not all of them have is optional.
    """

    def __init__(
        self, outer: list[WeightInfo], prefix: str, inner: list[WeightInfo], count: int, key: str
    ):
        """Take what a checkpoint holds.

        Args:
            outer: the tensors outside the layers.
            prefix: what stands before a layer's number in a name.
            inner: the tensors of the layers, named by what stands after the number.
            count: of layers.
            key: the number of layers in the configuration.
        """
        self._outer, self._prefix, self._inner = outer, prefix, inner
        self._count, self._key = count, key

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """See mergekit's ModuleArchitecture."""
        return self._outer

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """See mergekit's ModuleArchitecture."""
        return []

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """See mergekit's ModuleArchitecture."""
        return [
            weight.model_copy(update={"name": f"{self._prefix}.{index}.{weight.name}"})
            for weight in self._inner
        ]

    def num_layers_config_key(self) -> str:
        """See mergekit's ModuleArchitecture."""
        return self._key

    def num_layers(self, config: PretrainedConfig) -> int:
        """See mergekit's ModuleArchitecture."""
        return self._count


def architecture_of(config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Return the architecture that a recipe is planned with: all tensors, under their names.

    It is mergekit's where that names the base's tensors as they are stored, where the models store
    theirs under different names, and where the recipe names modules, which only mergekit knows.

    Args:
        config: a recipe with a base.
        options: mergekit's; its loaders must know them.
    """
    defined = get_architecture_info(config, options)
    base = config.base_model
    if config.modules or base is None:
        return defined
    try:
        own = model_class(base, options.trust_remote_code)
    except Exception as error:  # code of strangers, or a package that is not installed
        log_traceback(error)
        return defined
    stored = {m: _stored(m) for m in dict.fromkeys([base, *config.referenced_models()])}
    tied = {name for name in own.tied}
    shared = set.intersection(*stored.values())
    union = set.union(*stored.values())
    if any(own.names_of(name).isdisjoint(tied) for name in union - shared):
        return defined
    model_config = base.config(trust_remote_code=options.trust_remote_code)
    if _names_all(defined, model_config, union):
        return defined
    return _stored_architecture(own, model_config, union)


def _stored(model: ModelReference) -> set[str]:
    return set(LoaderCache().get(model).index.tensor_paths)


def _names_all(defined: ModelArchitecture, config: PretrainedConfig, stored: set[str]) -> bool:
    """Return whether an architecture names all stored tensors and no other that it needs."""
    try:
        weights = defined.all_weights(config)
    except (RuntimeError, KeyError, IndexError, TypeError):
        return False
    named = [{w.name, *(w.aliases or ()), *(w.tied_names or ())} for w in weights]
    needed = [names for names, w in zip(named, weights, strict=True) if not w.optional]
    return set().union(*named) >= stored and all(names & stored for names in needed)


def _stored_architecture(
    own: ModelClass, config: PretrainedConfig, stored: Collection[str]
) -> ModelArchitecture:
    """Return the architecture of a checkpoint of a class that has these tensors."""
    numbered = {name: match for name in sorted(stored) if (match := _NUMBER.search(name))}
    of_text = Counter(
        name[: match.start()] for name, match in numbered.items() if own.is_text(name)
    )
    prefix = of_text.most_common(1)[0][0] if of_text else ""
    layers = {n: m for n, m in numbered.items() if n[: m.start()] == prefix} if of_text else {}
    count = 1 + max((int(match.group(1)) for match in layers.values()), default=-1)
    inner: dict[str, int] = Counter(name[match.end() :] for name, match in layers.items())
    head = own.tied.keys()

    def info(name: str, places: set[str], *, optional: bool) -> WeightInfo:
        axes = [own.vocabulary_axes[place] for place in places if place in own.vocabulary_axes]
        return WeightInfo(name=name, vocabulary_axis=axes[0] if axes else None, optional=optional)

    outer = [
        info(name, places, optional=not places.isdisjoint(head))
        for name in sorted(set(stored) - set(layers))
        for places in [own.names_of(name)]
    ]
    module = StoredModule(
        outer,
        prefix,
        [info(name, set(), optional=number < count) for name, number in sorted(inner.items())],
        count,
        "num_hidden_layers"
        if hasattr(config, "num_hidden_layers")
        else "text_config.num_hidden_layers",
    )
    return ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=module)},
        architectures=[own.name],
        model_type=config.model_type,
        vocab_size_config_key=None if hasattr(config, "vocab_size") else "text_config.vocab_size",
    )
