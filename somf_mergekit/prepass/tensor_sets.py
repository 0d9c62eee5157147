"""Whether a planned merge writes the tensors of its inputs: all that each model has."""

import logging
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.architecture.auto import RE_LAYER_INDEX
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ..common.errors import few, log_traceback
from ..common.model_classes import ModelClass, model_class
from .plan import gather_task

LOG = logging.getLogger(__name__)


def tensor_set_problems(
    tensors: Collection[tuple[WeightInfo, Any]], options: MergeOptions
) -> list[str]:
    """Return a sentence on each tensor that a model lacks, and on those that the merge would lose.

    What the model's own class doesn't load (rotary frequencies, layers that predict further tokens)
    may be lost, which is logged.

    Args:
        tensors: each tensor that will be written, with the task that makes it.
        options: mergekit's; its loaders must know them.
    """
    inputs = [(task.base_model, gather_task(task).weight_info) for _, task in tensors]
    lacking: dict[ModelReference, list[str]] = {}
    problems: list[str] = []
    for base, sources in inputs:
        for model, source in sources.items():
            if is_missing(model, source, options) and not _may_lack(model, source, options):
                lacking.setdefault(model, []).append(str(source.name))
        problems += _part_problems(base, sources, options)
    problems += [
        f"{model}: its checkpoint has no {few(names)}, which mergekit takes from every model of "
        "this merge: it is incomplete, or was saved by another version of transformers"
        for model, names in lacking.items()
    ]
    taken = {name for _, sources in inputs for s in sources.values() for name in names_of(s)}
    alike: dict[tuple[str, ...], list[ModelReference]] = {}
    for model in sorted({model for _, sources in inputs for model in sources}, key=str):
        lost, ignored = _not_taken(model, taken, options)
        if lost:
            alike.setdefault(tuple(lost), []).append(model)
        if ignored:
            LOG.warning(
                "%s: left out of the merge, since transformers doesn't load it either: %s",
                model,
                few(ignored),
            )
    return [*problems, *(_loss(models, lost, options) for lost, models in alike.items())]


def names_of(source: WeightInfo) -> list[str]:
    """Return the names under which mergekit looks for a tensor."""
    return [source.name, *(source.aliases or ()), *(source.tied_names or ())]


def is_missing(model: ModelReference, source: WeightInfo, options: MergeOptions) -> bool:
    """Return whether mergekit finds a tensor in a checkpoint neither stored nor in parts."""
    stored = LoaderCache().get(model).index.tensor_paths
    names = names_of(source)
    if any(name in stored for name in names):
        return False
    kind = model.config(trust_remote_code=options.trust_remote_code).model_type
    return not any(can_convert_checkpoint_keys(kind, set(stored), name) for name in names)


def _class_of(model: ModelReference, options: MergeOptions) -> ModelClass | None:
    """Return the class of a model; None where transformers can't make it."""
    try:
        return model_class(model, options.trust_remote_code)
    except Exception as error:  # code of strangers, or a package that is not installed
        log_traceback(error)
        return None


@lru_cache(maxsize=16)
def _known_names(model: ModelReference, options: MergeOptions) -> dict[str, set[str]]:
    """Return the names that each stored tensor of a model goes by; its own where none is known."""
    own = _class_of(model, options)
    stored = LoaderCache().get(model).index.tensor_paths
    return {name: own.names_of(name) if own else {name} for name in stored}


def _may_lack(model: ModelReference, source: WeightInfo, options: MergeOptions) -> bool:
    """Return whether a model may do without a tensor, since its class ties it to another."""
    if not source.optional:
        return False
    own = _class_of(model, options)
    return own is not None and source.name in own.tied


def _part_problems(
    base: ModelReference | None, sources: Mapping[ModelReference, WeightInfo], options: MergeOptions
) -> Iterator[str]:
    """Yield a sentence where a model has other parts of a tensor (experts) than the base."""
    parts = {m: _parts(m, str(source.name), options) for m, source in sources.items()}
    expected = parts.get(base)
    for model, found in parts.items():
        if expected and found and expected != found:
            which = f"lacks {few(expected - found)}" if expected - found else ""
            which = which or f"has {few(found - expected)} besides"
            yield (
                f"{model}: {sources[model].name} is put together from other tensors than in the "
                f"base {base}: its checkpoint {which}"
            )


def _parts(model: ModelReference, name: str, options: MergeOptions) -> set[str]:
    """Return the stored tensors that are joined to one; none where it is stored itself."""
    if name in LoaderCache().get(model).index.tensor_paths:
        return set()
    return {part for part, known in _known_names(model, options).items() if name in known}


def _not_taken(
    model: ModelReference, taken: set[str], options: MergeOptions
) -> tuple[list[str], list[str]]:
    """Return the tensors of a model that no task takes: those that its class loads, and others."""
    own = _class_of(model, options)
    templates = {RE_LAYER_INDEX.sub(".*.", name, count=1) for name in taken}
    layers = {name[: match.end()] for name in taken if (match := RE_LAYER_INDEX.search(name))}
    lost: list[str] = []
    ignored: list[str] = []
    for name, known in _known_names(model, options).items():
        if own:
            known = known | {tied for place in known for tied in own.tied.get(place, ())}
        if known & taken or any(_in_other_layer(place, templates, layers) for place in known):
            continue
        (lost if own is None or own.loads(name) else ignored).append(name)
    return lost, ignored


def _in_other_layer(name: str, templates: set[str], layers: set[str]) -> bool:
    """Return whether the recipe leaves out a tensor's whole layer, and takes it in others."""
    match = RE_LAYER_INDEX.search(name)
    return (
        match is not None
        and name[: match.end()] not in layers
        and RE_LAYER_INDEX.sub(".*.", name, count=1) in templates
    )


def _loss(models: list[ModelReference], lost: Collection[str], options: MergeOptions) -> str:
    """Return a sentence on tensors that would be lost: whose, why, and the way out if any."""
    own = _class_of(models[0], options)
    config = models[0].config(trust_remote_code=options.trust_remote_code)
    if own and not any(name in own.shapes for name in lost):
        why = (
            "mergekit can't join them as transformers does on loading. Store every model of the "
            "recipe as transformers has it in memory, with `AutoModelForCausalLM.from_pretrained("
            "MODEL).save_pretrained(FOLDER, save_original_format=False)`, and merge these folders"
        )
    elif arch_info_for_config(config):
        why = f"mergekit's definition of {config.architectures[0]} doesn't have them"
    else:
        why = "the other models don't have them"
    named = ", ".join(map(str, models))
    return f"{named}: the merge would lose {len(lost)} tensors ({few(lost)}): {why}"
