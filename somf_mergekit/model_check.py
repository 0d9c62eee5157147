"""Whether the models that a recipe names are there and can be opened; no weight is read."""

import os
from collections.abc import Collection

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from .errors import first_line


def configuration_problems(model: ModelReference, options: MergeOptions) -> list[str]:
    """Return a sentence where a model can't be merged as far as its configuration tells."""
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:
        return [f"model {model}: its configuration can't be read: {first_line(error)}"]
    if getattr(config, "quantization_config", None):
        return [
            f"model {model}: it is quantized, and mergekit would take what is stored for the "
            "weights themselves, without their scales; give it in bfloat16 or float32"
        ]
    if model.lora and not options.lora_merge_cache:
        return [f"model {model}: an adapter needs mergekit's option --lora-merge-cache DIR"]
    return []


def weight_problems(model: ModelReference, options: MergeOptions) -> list[str]:
    """Return a sentence where a model's weights can't be opened, or are not those of its adapter.

    mergekit's loaders must know the options.
    """
    kept = _kept_adapter(model, options)
    if model.lora and not os.path.isdir(kept):
        # mergekit will put it into its base.
        return []
    hint = f"; if {kept} was left unfinished, remove it" if kept else ""
    try:
        index = LoaderCache().get(model).index
    except Exception as error:  # a damaged checkpoint has many of its own
        return [f"model {model}: its weights can't be opened: {first_line(error)}{hint}"]
    files = {os.path.join(index.base_path, file) for file in index.tensor_paths.values()}
    if kept and _changed(_files_in(model.lora.path, model.model.path)) > _changed(files):
        return [
            f"model {model}: the adapter or its base was changed after mergekit put them together "
            f"in {kept}, which it would take: remove that folder"
        ]
    return []


def _kept_adapter(model: ModelReference, options: MergeOptions) -> str:
    """Return where mergekit keeps an adapter with its base, once it has put them together."""
    if not model.lora:
        return ""
    # As ModelReference.merged names it.
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    return os.path.join(options.lora_merge_cache, name)


def _files_in(*folders: str) -> list[str]:
    """Return the weight files in those of the folders that are on this machine."""
    ends = (".safetensors", ".bin")
    return [
        os.path.join(folder, name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if name.endswith(ends)
    ]


def _changed(files: Collection[str]) -> float:
    """Return when the last of the files was changed."""
    return max((os.stat(file).st_mtime for file in files if os.path.exists(file)), default=0.0)
