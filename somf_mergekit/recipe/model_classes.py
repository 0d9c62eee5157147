"""The transformers class of a model, built without its weights: which tensors it loads."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls


@dataclass(frozen=True)
class ModelClass:
    """What the class that a model's configuration names loads of a checkpoint.

    Attributes:
        name: of the class.
        shapes: of its tensors, by name.
        parameters: the names of those that are learned, unlike buffers.
        tied: the names of each tensor that has several, by each of them.
        prefix: what the names of a checkpoint may begin with or lack.
        transforms: how transformers renames and joins a checkpoint's tensors.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    parameters: set[str]
    tied: dict[str, list[str]]
    prefix: str
    transforms: list[Any]

    def names_of(self, stored: str) -> set[str]:
        """Return the names that a stored tensor, or what it becomes a part of, may have."""
        prefix = f"{self.prefix}."
        names = {stored, prefix + stored, stored.removeprefix(prefix)}
        for transform in self.transforms:
            for name in list(names):
                renamed, pattern = transform.rename_source_key(name)
                if pattern is not None:
                    first, *others = transform.target_patterns
                    names |= {renamed, *(renamed.replace(first, other, 1) for other in others)}
        return names

    def loads(self, stored: str) -> bool:
        """Return whether the class takes a stored tensor."""
        return any(name in self.shapes for name in self.names_of(stored))


@lru_cache(maxsize=32)
def model_class(model: ModelReference, trust_remote_code: bool) -> ModelClass:
    """Return the class that a model's configuration names.

    Raises:
        Exception: whatever transformers raises where it can't make one.
    """
    config = model.config(trust_remote_code=trust_remote_code)
    return class_of(empty_model(get_auto_cls(config.architectures[0]), config, trust_remote_code))


def class_of(made: Any) -> ModelClass:
    """Return what the class of a model loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    names = defaultdict(list)
    for name, weight in made.named_parameters(remove_duplicate=False):
        names[id(weight)].append(name)
    return ModelClass(
        name=type(made).__name__,
        shapes=shapes_of(made),
        parameters={name for group in names.values() for name in group},
        tied={name: group for group in names.values() if len(group) > 1 for name in group},
        prefix=made.base_model_prefix,
        transforms=get_model_conversion_mapping(made),
    )


def empty_model(
    auto_class: Any, config: Any, trust_remote_code: bool, attention: str | None = "eager"
) -> Any:
    """Return a model of a configuration on the meta device: its tensors have names and shapes only.

    Args:
        auto_class: of transformers.
        config: of the model.
        trust_remote_code: as mergekit's option.
        attention: the implementation of attention; None for the one that the configuration names.

    Raises:
        Exception: whatever transformers raises where it can't make it.
    """
    from transformers.initialization import no_init_weights

    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"), no_init_weights():
        made = auto_class.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, **chosen
        )
    made.tie_weights()
    return made


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a model's checkpoint holds, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
