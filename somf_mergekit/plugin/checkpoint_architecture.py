"""Architectures read from the checkpoints, where mergekit's would lose or rename tensors."""

from collections import Counter
from collections.abc import Collection
from itertools import takewhile

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    get_architecture_info,
)
from mergekit.architecture.auto import RE_LAYER_INDEX
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from ..common.errors import log_traceback
from ..common.model_classes import ModelClass, model_class
from ..prepass.tensor_sets import names_of


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

    It is mergekit's where that names all tensors that the models store, or where the models store
    theirs under different names, so that only transformers' conversion brings them together.

    Args:
        config: a recipe with a base.
        options: mergekit's; its loaders must know them.
    """
    defined = get_architecture_info(config, options)
    base = config.base_model
    try:
        own = model_class(base, options.trust_remote_code)
    except Exception as error:  # code of strangers, or a package that is not installed
        log_traceback(error)
        return defined
    models = dict.fromkeys([base, *config.referenced_models()])
    stored = [set(LoaderCache().get(model).index.tensor_paths) for model in models]
    names = set.union(*stored)
    partial = names - set.intersection(*stored)
    if any(own.names_of(name).isdisjoint(own.tied) for name in partial):
        return defined
    model_config = base.config(trust_remote_code=options.trust_remote_code)
    if _names_all(defined, model_config, own, names):
        return defined
    # A recipe that names modules names them as mergekit does.
    groups = _by_module(defined, model_config, own, names) if config.modules else {"default": names}
    outer = "" if hasattr(model_config, "num_hidden_layers") else "text_config."
    return ModelArchitecture(
        modules={
            name: ModuleDefinition(
                architecture=_stored_module(own, group, f"{outer}num_hidden_layers")
            )
            for name, group in groups.items()
        },
        architectures=[own.name],
        model_type=model_config.model_type,
    )


def _names_all(
    defined: ModelArchitecture, config: PretrainedConfig, own: ModelClass, stored: set[str]
) -> bool:
    """Return whether an architecture names all stored tensors and no other that it needs."""
    try:
        weights = defined.all_weights(config)
    except (RuntimeError, KeyError, IndexError, TypeError):
        return False
    named = [set(names_of(weight)) for weight in weights]
    needed = [names for names, w in zip(named, weights, strict=True) if not w.optional]
    known = stored | {name for one in stored for name in own.tied.get(one, ())}
    return set().union(*named) >= stored and all(names & known for names in needed)


def _by_module(
    defined: ModelArchitecture, config: PretrainedConfig, own: ModelClass, stored: Collection[str]
) -> dict[str, list[str]]:
    """Return stored names by mergekit's module: that of the name, or of the name most like it."""
    places = {
        place: name
        for name, module in defined.modules.items()
        for weight in module.architecture.all_weights(config)
        for place in own.names_of((module.weight_prefix or "") + weight.name)
    }
    found: dict[str, list[str]] = {name: [] for name in defined.modules}
    for name in sorted(stored):
        known = own.names_of(name)
        alike = next((place for place in known if place in places), None) or max(
            places, key=lambda place: max(_common_parts(place, one) for one in known)
        )
        found[places[alike]].append(name)
    return found


def _common_parts(name: str, other: str) -> int:
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _stored_module(own: ModelClass, stored: Collection[str], key: str) -> StoredModule:
    """Return the part of a checkpoint that has these tensors; of their layers, the decoder's."""
    numbered = {name: match for name in sorted(stored) if (match := RE_LAYER_INDEX.search(name))}
    of_text = [name for name in numbered if own.is_text(name)] or [*numbered]
    prefixes = Counter(name[: numbered[name].start()] for name in of_text)
    prefix = max(prefixes, key=prefixes.__getitem__, default="")
    layers = {n: m for n, m in numbered.items() if n[: m.start()] == prefix}
    count = 1 + max((int(match.group(1)) for match in layers.values()), default=-1)
    inner = Counter(name[match.end() :] for name, match in layers.items())

    def outer(name: str) -> WeightInfo:
        places = own.names_of(name)
        axes = [own.vocabulary_axes[place] for place in places if place in own.vocabulary_axes]
        is_tied = not places.isdisjoint(own.tied)
        return WeightInfo(name=name, vocabulary_axis=axes[0] if axes else None, optional=is_tied)

    return StoredModule(
        [outer(name) for name in sorted(set(stored) - set(layers))],
        prefix,
        [WeightInfo(name=name, optional=inner[name] < count) for name in sorted(inner)],
        count,
        key,
    )
