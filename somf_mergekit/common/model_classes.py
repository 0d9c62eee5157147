"""The transformers class of a model, built without its weights: which tensors it loads."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.common import ModelReference, get_auto_cls
from torch import Tensor

# Of transformers, by what each maps types of models for; the first that has a class makes it.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MULTIMODAL_LM": "AutoModelForMultimodalLM",
}


@dataclass(frozen=True)
class Slice:
    """Where a checkpoint's tensor lies in a weight of the model that loads it.

    Attributes:
        name: of the weight.
        steps: methods of a tensor with their arguments, which lead from the weight to the tensor.
    """

    name: str
    steps: tuple[tuple[Any, ...], ...] = ()

    def of(self, weight: Tensor) -> Tensor:
        """Return the checkpoint's tensor as a view of the weight, or of its gradient."""
        for method, *arguments in self.steps:
            weight = getattr(weight, method)(*arguments)
        return weight


@dataclass(frozen=True)
class ModelClass:
    """What the class that a model's configuration names loads of a checkpoint.

    Attributes:
        name: of the class.
        shapes: of its tensors, by name.
        parameters: the names of those that are learned, unlike buffers.
        tied: the names of each tensor that has several, by each of them.
        text: the names of those of the text decoder, its embeddings and its output head.
        vocabulary_axes: the axis of tokens of each tensor that has one.
        prefix: what the names of a checkpoint may begin with or lack.
        transforms: how transformers renames and joins a checkpoint's tensors.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    parameters: set[str]
    tied: dict[str, list[str]]
    text: set[str]
    vocabulary_axes: dict[str, int]
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

    def is_text(self, stored: str) -> bool:
        """Return whether a stored tensor takes part where the model is given text alone."""
        return not self.names_of(stored).isdisjoint(self.text)

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
    return class_of(empty_model(config, trust_remote_code))


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
        text=text_names(made),
        vocabulary_axes=infer_vocabulary_axes(made),
        prefix=made.base_model_prefix,
        transforms=get_model_conversion_mapping(made),
    )


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes and loads the model of a configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    name = config.architectures[0]
    for task, auto in _AUTO_CLASSES.items():
        named = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if named.get(config.model_type) == name:
            return getattr(transformers, auto)
    return get_auto_cls(name)


def text_decoder(model: Any) -> Any:
    """Return the part of a model that makes the last hidden states of a text.

    In a model that takes images or sound too, it is the part that these are handed to.
    """
    decoder = model.get_decoder()
    # Of Llama 4, transformers gives the decoder together with its head.
    return decoder if decoder.get_output_embeddings() is None else decoder.model


def text_names(model: Any) -> set[str]:
    """Return the names of the weights of a model that take part where it is given text alone."""
    parts = (text_decoder(model), model.get_input_embeddings(), model.get_output_embeddings())
    weights = {
        id(w) for part in parts if part is not None for w in (*part.parameters(), *part.buffers())
    }
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name for name, weight in named if id(weight) in weights}


def empty_model(config: Any, trust_remote_code: bool, attention: str | None = "eager") -> Any:
    """Return a model of a configuration on the meta device: its tensors have names and shapes only.

    Args:
        config: of the model.
        trust_remote_code: as mergekit's option.
        attention: the implementation of attention; None for the one that the configuration names.

    Raises:
        Exception: whatever transformers raises where it can't make it.
    """
    from transformers.initialization import no_init_weights

    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"), no_init_weights():
        made = auto_class(config).from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, **chosen
        )
    made.tie_weights()
    return made


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a model's checkpoint holds, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stored_slices(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slice]:
    """Return where each tensor of a checkpoint lies in a model, as transformers loads it.

    Args:
        model: of transformers.
        shapes: of the checkpoint's tensors, by name.

    Returns:
        By name; without the tensors that the model doesn't load, and those that it converts in
        other ways than by joining them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    slices: dict[str, Slice] = {}
    joined: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):
        place, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, places
        )
        if place not in places and name in places:
            place, pattern = name, None
        if place not in places:
            continue
        if pattern is None:
            slices[name] = Slice(place)
        else:
            joined[place][pattern].append(name)
    for place, sources in joined.items():
        converter = next(each for each in converters if {*sources} <= {*each.source_patterns})
        groups = [
            [(shapes[name], {name: ()}) for name in sources[pattern]]
            for pattern in converter.source_patterns
        ]
        expected = tuple(places[place].shape)
        shape, steps = _converted(groups, converter.operations, expected)
        if shape == expected:
            slices |= {name: Slice(place, steps[name]) for name in steps}
    return slices


# The shape of a tensor that stored ones were joined to, and the steps that lead back to each.
_Joined = tuple[tuple[int, ...], dict[str, tuple[Any, ...]]]


def _converted(
    groups: list[list[_Joined]], operations: Iterable[Any], expected: tuple[int, ...]
) -> _Joined:
    """Return what transformers' operations make of stored tensors; an empty one where unknown."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    steps: list[tuple[Any, ...]]
    for operation in operations:
        if isinstance(operation, MergeModulelist):
            dim = operation.dim
            for group in groups:
                inner = group[0][0]
                shape = (*inner[:dim], len(group), *inner[dim:])
                steps = [("select", dim, index) for index in range(len(group))]
                group[:] = [(shape, _stepped(group, steps))]
        elif isinstance(operation, Concatenate):
            dim, group = operation.dim, [block for group in groups for block in group]
            sizes = [shape[dim] for shape, _ in group]
            inner = group[0][0]
            shape = (*inner[:dim], sum(sizes), *inner[dim + 1 :])
            steps = [("narrow", dim, sum(sizes[:n]), size) for n, size in enumerate(sizes)]
            groups = [[(shape, _stepped(group, steps))]]
        elif (
            isinstance(operation, Transpose)
            and getattr(operation, "check_dims", False)
            and groups[0][0][0] == expected
        ):
            # Stored by another version, in the order that the model has.
            continue
        else:
            return (), {}
    if len(groups) != 1 or len(groups[0]) != 1:
        return (), {}
    return groups[0][0]


def _stepped(group: list[_Joined], steps: list[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (step, *further)
        for (_, parts), step in zip(group, steps, strict=True)
        for name, further in parts.items()
    }
