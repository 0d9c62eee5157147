"""A merge as mergekit planned it: its tokenizer, and what its tasks say."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from mergekit.tokenizer.build import get_stripped_tokenizer

from ..common.errors import RecipeError
from ..common.merge_options import SomfOptions
from ..common.model_classes import model_class
from ..data.chat import check_words
from ..mask.artifact import MaskSet
from ..recipe.name_patterns import may_get_mask
from ..recipe.settings import (
    MASK_MODEL,
    MASK_TENSOR,
    OBSERVER,
    Settings,
    parameters,
    recipe_settings,
)

TaskT = TypeVar("TaskT", bound=Task)


class MergedTokenizer(BuildTokenizer):
    """Builds the tokenizer once, and numbers its tokens in the same way in every process.

    mergekit numbers the tokens that the base lacks in the order of a fast tokenizer's
    ``get_vocab()`` and of a set of models, both of which change. Here they are in the order of
    their numbers in the models, whichever order the recipe names these in.
    """

    @classmethod
    def of(cls, task: BuildTokenizer) -> "MergedTokenizer":
        """Return the task that builds what ``task`` builds."""
        fields = {name: getattr(task, name) for name in BuildTokenizer.model_fields}
        # Of a token that several models have added, the first one's settings count.
        return cls(**fields | {"referenced_models": sorted(task.referenced_models, key=str)})

    def execute(self, **_: Any) -> TokenizerInfo:
        """Return the tokenizer with each model's tokens: the same object at each call."""
        return self._built

    @cached_property
    def _built(self) -> TokenizerInfo:
        info = super().execute()
        return info if self.tokenizer_source != "union" else self._numbered(info)

    def _numbered(self, info: TokenizerInfo) -> TokenizerInfo:
        base = self.base_model or self.referenced_models[0]
        tokenizer = get_stripped_tokenizer(base.model, self.trust_remote_code)
        vocabulary = info.tokenizer.get_vocab()
        if tokenizer.get_vocab().keys() == vocabulary.keys():
            return info

        def place(token: str) -> tuple[float, str]:
            own = [numbers[token] for numbers in info.original_vocabs.values() if token in numbers]
            return min(own, default=math.inf), token

        # mergekit adds every token that the base's vocabulary lacks.
        added = info.tokenizer.added_tokens_decoder.values()
        for token in sorted(added, key=lambda token: place(token.content)):
            tokenizer.add_tokens(token)
        numbers = tokenizer.get_vocab()
        if numbers.keys() != vocabulary.keys():
            raise RecipeError(
                "tokenizer: the union of these models' tokens can't be numbered in the same way "
                "each time; set `tokenizer: {source: base}`, or name a model as the source whose "
                "tokenizer has all tokens"
            )
        return TokenizerInfo(
            tokenizer=tokenizer,
            permutations={
                model: {
                    number: own[vocabulary[token]]
                    for token, number in numbers.items()
                    if vocabulary[token] in own
                }
                for model, own in info.permutations.items()
            },
            original_vocabs=info.original_vocabs,
        )


@dataclass(frozen=True)
class PlannedMerge:
    """A merge as mergekit planned it.

    Attributes:
        config: the recipe, as mergekit rewrote it.
        recipe: the recipe as it was given, YAML.
        options: mergekit's options and the machine's.
        base_model: the aligned model.
        out_config: transformers configuration of the merged model.
        tensors: each tensor that will be written, with the task that makes it; tied weights have
            the task of the first of them.
        tokenizer_task: builds the tokenizer, where the recipe asks for one.
    """

    config: MergeConfiguration
    recipe: str
    options: SomfOptions
    base_model: ModelReference
    out_config: Any
    tensors: tuple[tuple[WeightInfo, ExecuteMergeMethodTask], ...]
    tokenizer_task: MergedTokenizer | None

    @cached_property
    def settings(self) -> Settings:
        """The recipe's own parameters."""
        return recipe_settings(self.config)

    @cached_property
    def models(self) -> list[ModelReference]:
        """The base and the fine-tuned models, in the plan's order."""
        found = [self.base_model]
        for _, task in self.tensors:
            found += [model for model in task.model_order if model not in found]
        return found

    @cached_property
    def tokenizer_info(self) -> Any:
        """The tokenizer that mergekit builds, with each model's tokens; None where it builds none.

        Raises:
            RecipeError: a model's tokenizer can't be loaded, or they do not go together.
        """
        if self.tokenizer_task is None:
            return None
        try:
            return self.tokenizer_task.execute()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RecipeError(f"mergekit can't build the merge's tokenizer: {error}") from error

    @cached_property
    def tokenizer(self) -> Any:
        """The merged model's tokenizer, with the chat template that is written with it.

        Raises:
            RecipeError: the base has none that loads.
        """
        # It imports the planner, and with it this module.
        from mergekit.merge import _set_chat_template

        tokenizer = self._tokenizer
        _set_chat_template(tokenizer, self.config)
        return tokenizer

    @property
    def _tokenizer(self) -> Any:
        """The tokenizer that mergekit builds, else the base's."""
        from transformers import AutoTokenizer

        if self.tokenizer_info is not None:
            # The one that is written stays as it was built.
            return copy.deepcopy(self.tokenizer_info.tokenizer)
        base = self.base_model.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                base.path,
                revision=base.revision,
                trust_remote_code=self.options.trust_remote_code,
            )
            check_words(tokenizer)
        except (OSError, ValueError) as error:
            raise RecipeError(f"the base {base} has no tokenizer that loads: {error}") from error
        return tokenizer

    @cached_property
    def text_tensors(self) -> tuple[tuple[WeightInfo, ExecuteMergeMethodTask], ...]:
        """Those tensors that a mask is learned with: all but what sees and hears."""
        own = model_class(self.base_model, self.options.trust_remote_code)
        return tuple(
            (weight, task)
            for weight, task in self.tensors
            if own.is_text(weight.name) or not own.loads(weight.name)
        )

    @cached_property
    def of_models(self) -> dict[ModelReference, dict[str, Any]]:
        """What the recipe says of each fine-tuned model's mask, by parameter.

        Raises:
            RecipeError: parts of the recipe say it differently.
        """
        names = [p.name for p in parameters() if p.merge and (p.per_model or p.for_models)]
        found: dict[ModelReference, dict[str, Any]] = {}
        for _, task in self.tensors:
            for model, values in task.input_parameters.items():
                own = {name: values[name] for name in names if name in values}
                if own and found.setdefault(model, own) != own:
                    raise RecipeError(
                        f"{model}: its {', '.join(names)} must be the same wherever the recipe "
                        "names it"
                    )
        return {model: found[model] for model in self.models if model in found}

    @property
    def given(self) -> dict[ModelReference, str]:
        """The masks that the recipe gives, by model."""
        return {model: own["mask"] for model, own in self.of_models.items() if own["mask"]}

    @cached_property
    def learners(self) -> list[ModelReference]:
        """The models whose masks are learned."""
        has_data = self.settings.safety_dataset is not None
        return [
            model
            for model, own in self.of_models.items()
            if (has_data and not own["mask"] if own["learn"] is None else own["learn"])
        ]

    def learned(self, models: Sequence[ModelReference]) -> tuple[tuple[ModelReference, ...], ...]:
        """Return of some models those of each mask that is learned."""
        own = tuple(model for model in models if model in self.learners)
        if self.settings.mask_sharing == "shared":
            return (own,) if own else ()
        return tuple((model,) for model in own)

    def may_get_mask(self, name: str) -> bool:
        """Whether the recipe's patterns let this tensor have a mask."""
        return may_get_mask(name, self.settings.include, self.settings.exclude)


def task_parameters(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """Return a task's parameters as ``fusions.fused`` takes them: those per model as mappings."""
    values = dict(task.parameters.items())
    for model, own in task.input_parameters.items():
        for name, value in own.items():
            values.setdefault(name, {})[model] = value
    return values


def with_fields(task: TaskT, **fields: Any) -> TaskT:
    """Return one of mergekit's tasks with some of its fields changed."""
    own = {name: getattr(task, name) for name in type(task).model_fields}
    return type(task)(**own | fields)


def mask_name(task: ExecuteMergeMethodTask) -> str:
    """Return the name under which a mask for this tensor is stored: its name in the base."""
    return str(gather_task(task).weight_info[task.base_model].name)


def gather_task(task: ExecuteMergeMethodTask) -> GatherTensors:
    """Return the part of a task that loads its inputs, before any alignment of vocabularies."""
    inner = task.gather_tensors
    return inner if isinstance(inner, GatherTensors) else inner.gather_tensors


def with_masks(
    planned: PlannedMerge, masks: MaskSet, *, is_masked: bool = True, observer: Any = None
) -> PlannedMerge:
    """Return a plan whose tasks take their masks from ``masks``, or none of them.

    Without its masks a merge is the same in everything else, what it draws at random included.
    ``observer`` is what the merge method shows task vectors to, see ``report.vectors``.
    """
    further = {OBSERVER: observer, **({} if is_masked else {"exclude": "*"})}
    tensors = ((weight, with_mask(task, masks, **further)) for weight, task in planned.tensors)
    return replace(planned, tensors=tuple(tensors))


def with_mask(
    task: ExecuteMergeMethodTask, masks: MaskSet, **further: Any
) -> ExecuteMergeMethodTask:
    """Return mergekit's task of a tensor with the artifact that it takes its masks from.

    Args:
        task: of a somf recipe.
        masks: the artifact: one mask of all models, or masks of those that have one.
        further: parameters that are to be others than the recipe says.
    """
    shared = dict(task.parameters.items()) | {MASK_TENSOR: mask_name(task), **further}
    of_models = {}
    for model, values in task.input_parameters.items():
        has_mask = not masks.models or str(model) in masks.models
        own = {"mask": masks.path if has_mask else None, MASK_MODEL: str(model)}
        of_models[model] = {**values, **own} if model != task.base_model else values
    return with_fields(task, parameters=shared, input_parameters=of_models)
