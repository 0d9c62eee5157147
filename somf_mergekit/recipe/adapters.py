"""Adapters that mergekit puts into their base before it merges: whether they fit, and the doing."""

import logging
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors import safe_open

from ..common.errors import few, first_line
from ..common.model_classes import empty_model
from .model_paths import hub_id, local_folder, plain_name

LOG = logging.getLogger(__name__)


def cached_folder(model: ModelReference, options: MergeOptions) -> str:
    """Return where mergekit stores an adapter with its base, as ModelReference.merged names it."""
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    return os.path.join(options.lora_merge_cache, name)


def is_cached(model: ModelReference, options: MergeOptions) -> bool:
    """Return whether an adapter was put into its base before.

    mergekit takes any folder for that; an empty one, left by an attempt that failed, is removed.
    """
    folder = cached_folder(model, options)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
    return os.path.isdir(folder)


def cache_problem(
    model: ModelReference, files: Collection[str], options: MergeOptions
) -> str | None:
    """Return a sentence where an adapter or its base was changed after they were put together.

    Args:
        model: with an adapter.
        files: the weights that they were put together to.
        options: mergekit's.
    """
    if _changed(_files_in(model.lora.path, model.model.path)) <= _changed(files):
        return None
    return (
        f"model {model}: the adapter or its base was changed after mergekit put them together "
        f"in {cached_folder(model, options)}, which it would take: remove that folder"
    )


def adapter_problem(model: ModelReference, options: MergeOptions) -> str | None:
    """Return a sentence where PEFT can't put an adapter into its base; no weight of it is read."""
    import peft

    path, revision = model.lora.path, model.lora.revision
    config: Any = None
    why: str | None = None
    try:
        config = peft.PeftConfig.from_pretrained(path, revision=revision)
    except KeyError as error:
        why = f"PEFT knows no adapter of the type {error}"
    except Exception as error:  # as many as there are kinds of adapters
        why = f"its adapter_config.json can't be used: {first_line(error)}"
    if config is not None:
        why = _misfit(model, config, options)
    return f"model {model}: the adapter {path} can't be put on its base: {why}" if why else None


def base_problem(model: ModelReference, options: MergeOptions) -> str | None:
    """Return a sentence where an adapter was trained on another base than it is put on.

    Weights are compared where both bases are on this machine, else the ids of both on the hub.
    A quantized copy of a base, and one that others have published, has its name: it is the same.
    Where it can't be known, another name is logged.
    """
    import peft

    put_on = model.model.path
    try:
        config = peft.PeftConfig.from_pretrained(model.lora.path, revision=model.lora.revision)
    except Exception:  # reported by adapter_problem, where the adapter is needed
        return None
    trained_on = config.base_model_name_or_path
    if not trained_on or os.path.realpath(trained_on) == os.path.realpath(put_on):
        return None
    folders = local_folder(trained_on), local_folder(put_on, model.model.revision)
    is_named_alike = plain_name(trained_on) == plain_name(put_on)
    if is_named_alike and not (os.path.isdir(trained_on) and os.path.isdir(put_on)):
        return None
    is_other = _differ(folders[0], folders[1]) if folders[0] and folders[1] else None
    if is_other is None and hub_id(trained_on) and hub_id(put_on):
        is_other = not is_named_alike
    said = f"the adapter {model.lora} was trained on {trained_on}, and is put on {put_on}"
    if is_other and not options.allow_crimes:
        return (
            f"model {model}: {said}, another model: put it on the base that it was trained on, or "
            "merge with --allow-crimes if that is meant"
        )
    if is_other or (is_other is None and not is_named_alike):
        LOG.warning("%s", said)
    return None


def _differ(one: str, other: str) -> bool | None:
    """Return whether two checkpoints differ in the first row of a tensor, None where none compares.

    Integers, as quantized weights are stored, don't compare.
    """
    try:
        files = [ShardedTensorIndex.from_disk(folder) for folder in (one, other)]
    except Exception:  # no checkpoint: what is wrong with a model is reported where it is opened
        return None
    if not all(index.is_safetensors for index in files):
        return None
    compared = False
    with ExitStack() as opened:
        loaders = [_first_rows(index, opened) for index in files]
        for name in sorted(files[0].tensor_paths.keys() & files[1].tensor_paths.keys()):
            rows = [row(name) for row in loaders]
            if all(row.is_floating_point() for row in rows):
                compared = True
                type_ = max((row.dtype for row in rows), key=lambda each: torch.finfo(each).eps)
                if not torch.equal(*(row.to(type_) for row in rows)):
                    return True
    return False if compared else None


def _first_rows(index: ShardedTensorIndex, opened: ExitStack) -> Callable[[str], torch.Tensor]:
    """Return what reads the first row of a checkpoint's tensor."""
    files: dict[str, Any] = {}

    def first_row(name: str) -> torch.Tensor:
        file = index.tensor_paths[name]
        if file not in files:
            path = os.path.join(index.base_path, file)
            files[file] = opened.enter_context(safe_open(path, framework="pt"))
        found = files[file].get_slice(name)
        return found[:1] if found.get_shape() else found[...]

    return first_row


def _misfit(model: ModelReference, config: Any, options: MergeOptions) -> str | None:
    """Return why an adapter does not fit the model that it is to be put on."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if config.is_prompt_learning:
        return f"{config.peft_type.value} adds to the prompt and can't be merged into weights"
    try:
        _, _, found = loaded_adapter(model, config, options)
    except Exception as error:  # as many as there are kinds of adapters
        return " ".join(str(error).split()[:40]) or type(error).__name__
    if found.unexpected_keys:
        return f"the base has no place for its {few(found.unexpected_keys)}"
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    lacking = [name for name in found.missing_keys if own in name]
    return f"it has no {few(lacking)}, which its configuration asks for" if lacking else None


def loaded_adapter(model: ModelReference, config: Any, options: MergeOptions) -> tuple[Any, ...]:
    """Return an adapter's tensors, PEFT's model of it on an empty base, and what did not fit.

    Raises:
        Exception: whatever PEFT raises where they don't go together.
    """
    import peft

    path, revision = model.lora.path, model.lora.revision
    of_base = model.config(trust_remote_code=options.trust_remote_code)
    made = empty_model(of_base, options.trust_remote_code)
    with torch.device("meta"):
        adapted = peft.PeftModel(made, config)
    given = peft.load_peft_weights(path, device="cpu", revision=revision)
    found = peft.set_peft_model_state_dict(adapted, dict(given), low_cpu_mem_usage=True)
    return given, adapted, found


def put_together(model: ModelReference, options: MergeOptions) -> str | None:
    """Let mergekit put an adapter into its base; return a sentence where it fails.

    Nothing is left of an attempt that fails: mergekit would take what is left for the result.
    """
    folder = cached_folder(model, options)
    is_new = not os.path.exists(folder)
    try:
        LoaderCache().get(model)
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        return f"model {model}: mergekit can't put the adapter on its base: {first_line(error)}"
    return None


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
