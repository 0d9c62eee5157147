"""Embeddings and output heads that are one weight in some models of a merge, and two in others."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from ..common.errors import log_traceback
from ..common.model_classes import empty_model
from .plan import PlannedMerge, gather_task, with_fields

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]


class TiedCopy(Task[torch.Tensor]):
    """Copies a merged tensor, to be written under the name of another that is tied to it.

    mergekit's writer copies every tensor of a file where two share memory.
    """

    tensor_task: ExecuteMergeMethodTask

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the task of the tensor to copy."""
        return {"tensor": self.tensor_task}

    def group_label(self) -> str | None:
        """Return that task's label, so that the two are run together."""
        return self.tensor_task.group_label()

    def execute(self, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return the copy."""
        return tensor.clone()


def as_written(weight: WeightInfo, task: ExecuteMergeMethodTask) -> Task[Any]:
    """Return the task that makes what is written as ``weight``."""
    return task if weight.name == task.output_weight.name else TiedCopy(tensor_task=task)


def settled_ties(tensors: list[Planned], out_config: Any, options: MergeOptions) -> list[Planned]:
    """Return planned tensors whose embeddings and head are what transformers makes of the models.

    Where the merged model's are tied, both are written from one task, so that what is drawn for
    them is drawn once. Where a model has a head of its own although the base's is tied, the
    merge's is untied in ``out_config``, and a tied model's head is its embeddings.

    Args:
        tensors: of the merge, with their tasks.
        out_config: transformers configuration of the merged model; changed where it is untied.
        options: mergekit's.
    """
    pair = _embeddings_and_head(tensors)
    if pair is None:
        return tensors
    (one, task), (other, other_task) = (tensors[index] for index in pair)
    models = dict.fromkeys([*task.model_order, *other_task.model_order])
    stored = {model: _stored_names(model, (one, other)) for model in models}
    if not all(stored.values()):
        # They are put together from several tensors when they are loaded.
        return tensors
    is_tied = {m: ties_embeddings(m.config(options.trust_remote_code), options) for m in models}
    is_alike = all(
        len(names) == 1 or (is_tied[model] and _are_equal(model, names))
        for model, names in stored.items()
    )
    task, other_task = (
        _reading(each, {m for m in models if is_tied[m] and weight.name not in stored[m]}, further)
        for each, weight, further in ((task, one, other), (other_task, other, one))
    )
    if ties_embeddings(out_config, options):
        if not is_alike:
            for part in _parts(out_config):
                part.tie_word_embeddings = False
        elif not _are_parted(task, other_task):
            other_task = task
    found = list(tensors)
    found[pair[0]], found[pair[1]] = (one, task), (other, other_task)
    return found


def tie_problems(planned: PlannedMerge) -> list[str]:
    """Return a sentence where a recipe merges tied weights by different parameters."""
    pair = _embeddings_and_head(planned.tensors)
    if pair is None or not ties_embeddings(planned.out_config, planned.options):
        return []
    (one, task), (other, other_task) = (planned.tensors[index] for index in pair)
    if not _are_parted(task, other_task):
        return []
    return [
        f"{one.name} and {other.name} are one weight in these models (tie_word_embeddings), and "
        "the recipe gives them different parameters: let filters that match one of them match both"
    ]


def is_untied(planned: PlannedMerge) -> bool:
    """Return whether the merge's head is a weight of its own although the base's is tied."""
    config = planned.base_model.config(planned.options.trust_remote_code)
    options = planned.options
    return ties_embeddings(config, options) and not ties_embeddings(planned.out_config, options)


def _embeddings_and_head(tensors: Sequence[Planned]) -> list[int] | None:
    """Return where the two are among planned tensors; None where there aren't just two."""
    found = [
        index
        for index, (weight, _) in enumerate(tensors)
        if weight.vocabulary_axis is not None and not weight.name.endswith("bias")
    ]
    return found if len(found) == 2 else None


def _are_parted(task: ExecuteMergeMethodTask, other: ExecuteMergeMethodTask) -> bool:
    """Return whether a recipe gives two tensors of the same models different parameters."""
    return task.model_order == other.model_order and _values(task) != _values(other)


def ties_embeddings(config: Any, options: MergeOptions) -> bool:
    """Return whether transformers makes one weight of embeddings and head of a configuration."""
    said = {bool(getattr(part, "tie_word_embeddings", False)) for part in _parts(config)}
    if len(said) == 1:
        return said.pop()
    # Which of the two counts depends on the class of the model.
    try:
        made = empty_model(config, options.trust_remote_code)
    except Exception as error:  # code of strangers, or a package that is not installed
        log_traceback(error)
        return bool(getattr(config, "tie_word_embeddings", False))
    head = made.get_output_embeddings()
    return head is not None and head.weight is made.get_input_embeddings().weight


def copy_ties(config: Any, to: Any) -> None:
    """Let another configuration say of ties what ``config`` says."""
    for part, own in zip(_parts(to), _parts(config), strict=True):
        if hasattr(own, "tie_word_embeddings"):
            part.tie_word_embeddings = own.tie_word_embeddings


def _parts(config: Any) -> tuple[Any, Any]:
    return config, config.get_text_config()


def _stored_names(model: ModelReference, weights: Iterable[WeightInfo]) -> dict[str, str]:
    """Return under which name a model stores each of those weights that it stores."""
    stored = LoaderCache().get(model).index.tensor_paths
    found = {w.name: [n for n in (w.name, *(w.aliases or ())) if n in stored] for w in weights}
    return {name: names[0] for name, names in found.items() if names}


def _are_equal(model: ModelReference, names: dict[str, str]) -> bool:
    loader = LoaderCache().get(model)
    one, other = map(loader.get_tensor, names.values())
    loader.flush()
    return torch.equal(one, other)


def _reading(
    task: ExecuteMergeMethodTask, models: set[ModelReference], further: WeightInfo
) -> ExecuteMergeMethodTask:
    """Return a task that reads another tensor of those ``models`` that store its own under none."""
    gathered = gather_task(task)
    names = (further.name, *(further.aliases or ()))
    sources = {
        model: source.model_copy(update={"tied_names": names}) if model in models else source
        for model, source in gathered.weight_info.items()
    }
    inner = with_fields(gathered, weight_info=ImmutableMap(data=sources))
    outer = task.gather_tensors
    return with_fields(
        task,
        gather_tensors=inner if outer is gathered else with_fields(outer, gather_tensors=inner),
    )


def _values(task: ExecuteMergeMethodTask) -> Any:
    own = {model: dict(values.items()) for model, values in task.input_parameters.items()}
    return dict(task.parameters.items()), own
