"""Whether the models that a recipe names are there and can be opened; no weight is read."""

import json
import logging
import os
from collections.abc import Collection, Iterable
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ..common.errors import few, first_line, raise_together
from .adapters import (
    adapter_problem,
    base_problem,
    cache_problem,
    cached_folder,
    is_cached,
    put_together,
)
from .model_paths import is_quantized_copy, local_folder, path_problem

LOG = logging.getLogger(__name__)
# What mergekit reads, the first that is there.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
# Beside the stored integers: scales, zero points and the like of GPTQ, AWQ, bitsandbytes, float8,
# compressed-tensors, MXFP4, EXL2, HQQ and Quanto.
_QUANTIZED = (
    *(".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map", ".weight_scale"),
    *(".q_weight", ".W_q", ".weight._data"),
    *(".weight_scale_inv", ".weight_packed", ".weight_zero_point", "_proj_scales", "_proj_blocks"),
)
_TO_GIVE = "give it in bfloat16 or float32"


def check_models(
    models: Collection[ModelReference],
    base: ModelReference | None,
    options: MergeOptions,
    found: Iterable[str],
    heading: str,
) -> None:
    """Check that models can be opened and go together, as far as no weight need be read.

    Args:
        models: of a recipe.
        base: its base.
        options: mergekit's; its loaders must know them.
        found: what is known to be wrong already.
        heading: what an error begins with.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    models = sorted(models, key=str)
    problems = list(found)
    for model in models:
        problems += _configuration_problems(model, options)
    # No weights are opened for what is wrong as its text says.
    raise_together(problems, heading)
    problems += _mixture_problems(models, base or models[0], options)
    for model in models:
        problems += _weight_problems(model, options)
    raise_together(problems, heading)
    adapted = [model for model in models if model.lora and not is_cached(model, options)]
    raise_together(filter(None, (put_together(model, options) for model in adapted)), heading)


def _configuration_problems(model: ModelReference, options: MergeOptions) -> list[str]:
    """Return a sentence where a model can't be merged as its configuration says."""
    form = path_problem(model) or _other_form(model.model.path)
    if form:
        return [f"model {model}: {form}"]
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:
        return [f"model {model}: its configuration can't be read: {first_line(error)}"]
    classes = config.architectures or []
    if len(classes) != 1:
        return [
            f"model {model}: its config.json names {' and '.join(classes) or 'no class'} as "
            f"`architectures`, where mergekit needs one{_class_hint(config)}"
        ]
    if any(
        getattr(part, name, None)
        for part in (config, config.get_text_config())
        for name in ("quantization_config", "compression_config")
    ):
        return [
            f"model {model}: it is quantized, and mergekit would take what is stored for the "
            f"weights themselves, without their scales; {_TO_GIVE}"
        ]
    if model.lora and not options.lora_merge_cache:
        return [f"model {model}: an adapter needs mergekit's option --lora-merge-cache DIR"]
    problem = base_problem(model, options) if model.lora else None
    return [problem] if problem else []


def _other_form(path: str) -> str | None:
    """Return what a path is that holds no checkpoint as mergekit reads it, and what to do."""
    if path.lower().endswith(".gguf"):
        return f"it is a GGUF file, which mergekit doesn't read; {_TO_GIVE}, as a folder"
    if os.path.isfile(path):
        return "it is a file; give the folder that it is in"
    if not os.path.isdir(path):
        return None
    files = os.listdir(path)
    if any(weights + end in files for weights in _WEIGHTS for end in ("", _INDEX)):
        return None
    if "adapter_config.json" in files:
        try:
            with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
                base = json.load(file).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        if base and is_quantized_copy(base):
            # Many are trained on one, but it can't be merged.
            base = None
        return f"it is an adapter; write `{base or 'BASE'}+{path}`, its base and the adapter"
    if any(name.lower().endswith(".gguf") for name in files):
        return f"its weights are GGUF files, which mergekit doesn't read; {_TO_GIVE}"
    return None


def _class_hint(config: Any) -> str:
    """Return how to name the class of a causal language model in its configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return f'; of a causal language model, `"architectures": ["{name}"]`' if name else ""


def _mixture_problems(
    models: Collection[ModelReference], base: ModelReference, options: MergeOptions
) -> list[str]:
    """Return a sentence where models are not of the base's class, or no adapter can be of it."""
    configs = {m: m.config(trust_remote_code=options.trust_remote_code) for m in {base, *models}}
    named = {model: config.architectures[0] for model, config in configs.items()}
    defined = {model: arch_info_for_config(config) for model, config in configs.items()}
    problems = []
    for model in models:
        is_alike = named[model] == named[base] or (
            defined[base] is not None and defined[model] == defined[base]
        )
        if not is_alike and not options.allow_crimes:
            problems.append(
                f"model {model}: it is a {named[model]}, {base} a {named[base]}: all models must "
                "have been fine-tuned from the same base, and be of its class"
            )
        elif model.lora and None in defined.values():
            problems.append(
                f"model {model}: mergekit has no definition of {named[model]}, and infers none "
                "from an adapter: merge the adapter into its base with PEFT, and give that model"
            )
    return problems


def _weight_problems(model: ModelReference, options: MergeOptions) -> list[str]:
    """Return a sentence where a model's weights can't be opened, or its adapter doesn't fit."""
    if model.lora and not is_cached(model, options):
        problem = adapter_problem(model, options)
        return [problem] if problem else []
    try:
        index = LoaderCache().get(model).index
    except Exception as error:  # a damaged checkpoint has many of its own
        cached = cached_folder(model, options) if model.lora else ""
        hint = f"; if {cached} was left unfinished, remove it" if cached else ""
        stored = local_folder(model.model.path, model.model.revision)
        if stored and stored != model.model.path:
            # mergekit asks the hub for a list of its files all the same.
            hint += f"; it is in the hub's cache: give that folder, {stored}"
        return [f"model {model}: its weights can't be opened: {first_line(error)}{hint}"]
    problems = _form_problems(model, index)
    if model.lora:
        files = {os.path.join(index.base_path, file) for file in index.tensor_paths.values()}
        changed = cache_problem(model, files, options)
        problems += [changed] if changed else []
    return problems


def _form_problems(model: ModelReference, index: ShardedTensorIndex) -> list[str]:
    """Return a sentence where a checkpoint is not what it seems by the names in it."""
    quantized = [name for name in index.tensor_paths if name.endswith(_QUANTIZED)]
    if quantized:
        return [
            f"model {model}: it is quantized, since it has {few(quantized)}, and mergekit would "
            f"take what is stored for the weights themselves; {_TO_GIVE}"
        ]
    whole, pickled = _WEIGHTS
    files = os.listdir(index.base_path)
    if {whole, whole + _INDEX} <= set(files) and whole not in index.tensor_paths.values():
        return [
            f"model {model}: it has both {whole}, which transformers loads, and {whole}{_INDEX}, "
            "whose files mergekit reads: remove the one that is not the model"
        ]
    if index.is_safetensors and {pickled, pickled + _INDEX} & set(files):
        LOG.warning("%s: its safetensors are read, and not the %s beside them", model, pickled)
    return []
