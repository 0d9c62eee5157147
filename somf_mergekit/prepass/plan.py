"""A merge as mergekit planned it, and what its tasks say."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from ..common.errors import RecipeError, few, first_line, log_traceback
from ..common.merge_options import SomfOptions
from ..data.chat import check_words
from ..recipe.model_classes import class_of, empty_model
from ..recipe.settings import Settings, may_get_mask, recipe_settings
from .merged_tokenizer import MergedTokenizer

TaskT = TypeVar("TaskT", bound=Task)


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


def input_names(task: ExecuteMergeMethodTask) -> list[str]:
    """Return the name that a tensor has in each model it is made of, in the task's order."""
    names = gather_task(task).weight_info
    return [str(names[model].name) for model in task.model_order]


def source_names(task: ExecuteMergeMethodTask) -> set[str]:
    """Return the names that a tensor has in the models it is made of."""
    return {str(source.name) for source in gather_task(task).weight_info.values()}


def mask_name(task: ExecuteMergeMethodTask) -> str:
    """Return the name under which a mask for this tensor is kept: its name in the base."""
    return str(gather_task(task).weight_info[task.base_model].name)


def learning_problem(planned: PlannedMerge) -> str | None:
    """Return a sentence where no mask can be learned for a merge as it is planned.

    The merge without task vectors must be the base model, and transformers must make a causal
    language model of it that has the tensors of the merge.
    """
    example = None
    for _, task in planned.tensors:
        name = task.output_weight.name
        if task.base_model != planned.base_model or mask_name(task) != name:
            example = f"{name} is made of {mask_name(task)} of {task.base_model}"
            break
    if example is None and planned.out_config is not None:
        layers = planned.out_config.get_text_config().num_hidden_layers
        base = planned.base_model.config(trust_remote_code=planned.options.trust_remote_code)
        if layers != base.get_text_config().num_hidden_layers:
            example = f"it has {layers} layers, the base {base.get_text_config().num_hidden_layers}"
    if example is None:
        return _class_problem(planned)
    return (
        f"a mask can't be learned for this merge, whose output is no model of the base's shape: "
        f"{example}. A learned mask can still be applied with the parameter `mask`"
    )


def _class_problem(planned: PlannedMerge) -> str | None:
    """Return a sentence where transformers makes no causal language model of the merge."""
    from transformers import AutoModelForCausalLM

    trust = planned.options.trust_remote_code
    named = planned.base_model.config(trust_remote_code=trust).architectures[0]
    ways = (
        "Give models that are causal language models, or a learned mask with the parameter `mask`"
    )
    try:
        made = class_of(empty_model(AutoModelForCausalLM, planned.out_config, trust, None))
    except ImportError as error:
        why = f"its configuration asks for what is not installed: {first_line(error)}"
        ways = "Install it, or take it (attn_implementation) out of the base's config.json"
    except Exception as error:  # a list of all configurations, or an error of a stranger's code
        log_traceback(error)
        why = "transformers can't load it as a causal language model"
    else:
        known = {name for weight, _ in planned.tensors for name in made.names_of(weight.name)}
        known |= {name for tied in known for name in made.tied.get(tied, ())}
        foreign = [w.name for w, _ in planned.tensors if not made.loads(w.name)]
        lacking = made.parameters - known
        if foreign and made.name != named:
            why = f"it would be learned on a {made.name}, which has no {few(foreign)}"
        elif lacking:
            why = f"{made.name} needs {few(lacking)}, which the merge does not write"
        else:
            return None
    return (
        f"a mask can't be learned for this merge: the base {planned.base_model} is a {named}, and "
        f"{why.removesuffix('.')}. {ways}"
    )


def gather_task(task: ExecuteMergeMethodTask) -> GatherTensors:
    """Return the part of a task that loads its inputs, before any alignment of vocabularies."""
    inner = task.gather_tensors
    return inner if isinstance(inner, GatherTensors) else inner.gather_tensors
