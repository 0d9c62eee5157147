"""What this package relies on in others beyond their documented use, and which versions have it.

A release that lacks something of it is refused with a sentence, before any work is done, where it
would else fail somewhere in the middle.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from inspect import signature

from .errors import raise_together

# When a contract is looked at: at every merge, or where a mask is learned too.
MERGING, LEARNING = "merging", "learning"
HEADING = "The installed packages do not go with this one"


@dataclass(frozen=True)
class Contract:
    """One thing that must be there.

    Attributes:
        module: where it is.
        name: of it.
        used_for: why, in words that follow "which".
        has: attributes, methods or fields that it must have.
        takes: arguments that it must take.
        when: MERGING or LEARNING.
    """

    module: str
    name: str
    used_for: str
    has: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    when: str = MERGING

    @property
    def package(self) -> str:
        """The package that it is in."""
        return self.module.split(".")[0]

    def missing(self) -> str | None:
        """Return what of it is not there, None where all is."""
        try:
            found = getattr(import_module(self.module), self.name)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name}"
        fields = {**getattr(found, "__annotations__", {}), **getattr(found, "model_fields", {})}
        for name in self.has:
            if name not in fields and not hasattr(found, name):
                return f"{self.module}.{self.name}.{name}"
        if self.takes:
            taken = signature(found).parameters
            for name in self.takes:
                if name not in taken:
                    return f"an argument {name} of {self.module}.{self.name}"
        return None


_BASE = "mergekit.merge_methods.base"
CONTRACTS = (
    Contract(
        "mergekit.merge_methods.registry",
        "register",
        "makes our merge methods known",
        takes=("method",),
    ),
    Contract("mergekit.merge_methods.registry", "get", "finds the fusion by its name"),
    Contract(
        "mergekit.merge_methods.registry", "registered_methods", "tells which fusions there are"
    ),
    Contract(
        _BASE,
        "GroupMergeMethod",
        "our merge methods are made of",
        has=("merge_group", "validate_inputs", "__call__"),
    ),
    Contract(
        _BASE,
        "MergeMethodSpec",
        "tells mergekit our parameters",
        takes=("name", "parameters", "contract", "pretty_name", "reference_url"),
    ),
    Contract(
        _BASE,
        "ParameterSpec",
        "tells mergekit our parameters, and us the fusions'",
        has=("required", "validate"),
        takes=("name", "value_type", "scope", "default", "description"),
    ),
    Contract(
        _BASE, "ParameterScope", "tells which parameters are per model", has=("SHARED", "NON_BASE")
    ),
    Contract(
        _BASE,
        "BasePolicy",
        "tells which fusions take a base",
        has=("REQUIRED", "IGNORED", "FORBIDDEN"),
    ),
    Contract(
        _BASE,
        "InputContract",
        "tells how many models a method takes",
        has=("validate_ids",),
        takes=("base", "min_non_base", "max_non_base"),
    ),
    Contract(
        _BASE,
        "TensorGroup",
        "holds a tensor of all models",
        has=("base", "non_base", "validate_tensors"),
        takes=("entries", "metadata"),
    ),
    Contract(
        _BASE,
        "TensorEntry",
        "holds a tensor of one model",
        takes=("id", "tensor", "is_base"),
    ),
    Contract(_BASE, "TensorMetadata", "holds a tensor's name", has=("from_weight_info", "name")),
    Contract(
        "mergekit.plan",
        "MergePlanner",
        "is asked for the plan and made to run the pre-pass",
        has=("_plan", "_tensors", "_tokenizer_task", "config", "options", "out_model_config"),
        takes=("config", "arch_info", "options", "out_model_config"),
    ),
    Contract(
        "mergekit.merge",
        "_model_out_config",
        "makes the merged model's configuration",
        takes=("config", "arch_info", "trust_remote_code"),
    ),
    Contract("mergekit.merge", "run_merge", "is made to check the recipe and to report"),
    Contract(
        "mergekit.merge_methods.task_adapter",
        "ExecuteMergeMethodTask",
        "says how a tensor is merged, and is given its mask",
        has=("gather_tensors", "model_order", "base_model", "parameters", "input_parameters"),
    ),
    Contract(
        "mergekit.io.tasks",
        "GatherTensors",
        "says from which files a tensor is read",
        has=("weight_info",),
    ),
    Contract(
        "mergekit.io.tasks",
        "LoaderCache",
        "opens the models' files",
        has=("get", "setup"),
    ),
    Contract(
        "mergekit.tokenizer",
        "PermutedVocabulary",
        "aligns vocabularies before a tensor is merged",
        has=("gather_tensors",),
    ),
    Contract(
        "mergekit.graph",
        "Executor",
        "reads tensors by mergekit's own loaders",
        has=("run",),
        takes=("targets", "math_device", "storage_device"),
    ),
    Contract(
        "mergekit.architecture",
        "WeightInfo",
        "names a tensor in each model",
        has=("name", "optional", "aliases", "tied_names", "force_dtype", "vocabulary_axis"),
    ),
    Contract(
        "mergekit.architecture.conversion",
        "can_convert_checkpoint_keys",
        "tells which tensors are put together when they are loaded",
    ),
    Contract(
        "mergekit.common",
        "ModelReference",
        "names a model",
        has=("model", "lora", "config", "merged", "local_path", "override_architecture"),
    ),
    Contract(
        "mergekit.common",
        "ModelPath",
        "tells where an adapter with its base is kept",
        has=("path", "revision", "_unique_id"),
    ),
    Contract(
        "mergekit.config",
        "MergeConfiguration",
        "holds a recipe",
        has=("models", "slices", "modules", "base_model", "parameters", "referenced_models"),
    ),
    Contract("mergekit.config", "ConditionalParameter", "holds a filter", has=("value", "filter")),
    Contract("mergekit.config", "ConfigYamlDumper", "writes a recipe"),
    Contract(
        "mergekit.options",
        "MergeOptions",
        "holds mergekit's options",
        has=("device", "lora_merge_cache", "trust_remote_code", "write_model_card", "quiet"),
    ),
    Contract(
        "torch.random",
        "fork_rng",
        "keeps a fusion's random draws apart",
        takes=("devices",),
    ),
    Contract(
        "torch",
        "Tensor",
        "moves a logit as soon as its gradient is complete",
        has=("register_post_accumulate_grad_hook",),
        when=LEARNING,
    ),
    Contract(
        "torch",
        "UntypedStorage",
        "frees the weights of a layer that has been gone through",
        has=("resize_",),
        when=LEARNING,
    ),
    Contract(
        "transformers.conversion_mapping",
        "get_model_conversion_mapping",
        "tells how checkpoints name a model's weights",
        when=LEARNING,
    ),
    Contract(
        "transformers.core_model_loading",
        "WeightRenaming",
        "tells how checkpoints name a model's weights",
        has=("rename_source_key",),
        when=LEARNING,
    ),
    Contract(
        "transformers.initialization",
        "no_init_weights",
        "makes a model without drawing its weights",
        when=LEARNING,
    ),
    Contract(
        "transformers.modeling_layers",
        "GradientCheckpointingLayer",
        "tells which modules are a model's layers",
        when=LEARNING,
    ),
    Contract(
        "transformers.pytorch_utils",
        "Conv1D",
        "is a linear layer of GPT-2",
        when=LEARNING,
    ),
)


@lru_cache(maxsize=2)
def contract_problems(when: str) -> tuple[str, ...]:
    """Return what the installed packages lack, a sentence each.

    Args:
        when: MERGING, or LEARNING for what learning needs besides.
    """
    found = []
    for contract in CONTRACTS:
        missing = contract.missing() if contract.when == when else None
        if missing:
            package = contract.package
            found.append(
                f"{package} {installed(package)} has no {missing}, which {contract.used_for}; "
                f"supported is {supported(package)}"
            )
    return tuple(found)


def check_contracts(when: str) -> None:
    """Check that the installed packages have what this one needs; looked at once in a process.

    Raises:
        RecipeError: they lack something, all of it together.
    """
    raise_together(contract_problems(when), HEADING)


def installed(package: str) -> str:
    """Return the version of a package that is installed, in words."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def supported(package: str) -> str:
    """Return the versions of a package that this one takes, as ``mergekit>=0.1.5,<0.2``."""
    try:
        needed = requires("somf-mergekit") or []
    except PackageNotFoundError:
        needed = []
    for text in needed:
        found = re.match(rf"{re.escape(package)}\s*([<>=!~][^;]*)", text)
        if found:
            return f"{package}{found[1].strip()}"
    return f"another version of {package}"
