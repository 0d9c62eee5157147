"""Check what a merge has written: its mask, whose that is, which tensors, and what is in them."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from torch import Tensor

from ..common.errors import RecipeError, first_line
from ..common.machine import MachineOptions
from ..common.merge_options import SomfOptions
from ..fusion.groups import are_equal
from ..mask.artifact import MaskSet
from ..prepass.plan import with_mask
from ..prepass.tensor_sets import tensor_set_problems
from ..prepass.weight_files import content_fingerprint
from ..recipe import settings as recipe
from ..recipe.blocks import parameter_blocks
from ..recipe.model_check import check_models
from ..recipe.validate import read_recipe
from .merge_check import OWN_METHODS, unchecked_plan

RECIPE_FILE = "mergekit_config.yml"
RIGHT, WRONG, UNCHECKED = "right", "WRONG", "not checked"
# Sums over a mask differ by it on another machine, or with another number of threads.
_ROUNDING = 1e-6


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        subject: what.
        verdict: RIGHT, WRONG or UNCHECKED.
        finding: what was found.
    """

    subject: str
    verdict: str
    finding: str


def checks(folder: str, options: MergeOptions, sample: int | None) -> Iterator[Check]:
    """Yield what is found of a merge's output, one check after another.

    Of a method of mergekit's own, only which tensors are there is checked.

    Args:
        folder: what the merge has written.
        options: mergekit's, as the merge was made with.
        sample: how many tensors are computed once more; None for all.
    """
    config, masks = None, None
    machine = SomfOptions.of(options).machine
    file = os.path.join(folder, RECIPE_FILE)
    try:
        config = read_recipe(file, [method.spec.name for method in registry.registered_methods()])
        yield Check("recipe", RIGHT, f"{RECIPE_FILE}, {config.merge_method}")
    except RecipeError as error:
        verdict = WRONG if os.path.exists(file) else UNCHECKED
        yield Check("recipe", verdict, f"{error.message}; without it no tensor can be computed")
    if config is None or config.merge_method == recipe.METHOD_NAME:
        try:
            masks = MaskSet.open(machine.work_dir or folder)
            intact = f"{len(masks.names())} tensors in {masks.path}, as their checksums say"
            problems = masks.problems()
            yield Check("artifact", WRONG if problems else RIGHT, "; ".join(problems) or intact)
        except RecipeError as error:
            yield Check("artifact", WRONG, error.message)
    if config is None:
        return
    LoaderCache().setup(options=options)
    if masks:
        yield _models(config, masks, machine)
    elif config.merge_method == recipe.METHOD_NAME:
        yield Check("tensors", UNCHECKED, "there is no mask to compute them with")
        return
    yield from _tensor_checks(folder, config, masks, options, sample)


def _models(config: MergeConfiguration, masks: MaskSet, machine: MachineOptions) -> Check:
    """Compare the models that the recipe names with those that the mask was learned with."""
    recorded = masks.provenance.get("models")
    if not isinstance(recorded, dict) or not recorded:
        return Check("models", UNCHECKED, "the mask does not record what it was learned with")
    base = recorded.get(str(masks.provenance.get("base_model")))
    missing: list[str] = []
    other: list[str] = []
    found: list[str] = []
    for model in sorted(config.referenced_models(), key=str):
        try:
            digest = content_fingerprint(model, machine.cache_dir)
        except Exception as error:  # a missing model comes in many ways
            missing.append(f"{model} is not at hand ({first_line(error)})")
            continue
        known = [base] if model == config.base_model else recorded.values()
        (found if digest in known else other).append(str(model))
    if other:
        what = f"the mask was learned with other models than {', '.join(other)}"
        if any("mask" in block for _, block, _ in parameter_blocks(config)):
            # A recipe may apply a mask to models that it was not learned with.
            return Check("models", UNCHECKED, f"{what}, and is given by the recipe")
        return Check("models", WRONG, what)
    if missing:
        return Check("models", UNCHECKED, "; ".join(missing))
    return Check("models", RIGHT, f"the mask was learned with these: {', '.join(found)}")


def _tensor_checks(
    folder: str,
    config: MergeConfiguration,
    masks: MaskSet | None,
    options: MergeOptions,
    sample: int | None,
) -> Iterator[Check]:
    """Yield what is found of the written tensors: those that are wrong, then all together.

    Each is computed by mergekit's loaders and this package's method, one at a time.
    """
    try:
        models = config.referenced_models()
        check_models(models, config.base_model, options, [], "This merge can't be planned")
        planned = unchecked_plan(config, options)
        written = _written(folder)
    except RecipeError as error:
        yield Check("tensors", UNCHECKED, error.message)
        return
    except Exception as error:  # whatever a damaged file makes of its reader
        yield Check("tensors", WRONG, f"the written weights can't be read: {first_line(error)}")
        return
    stored = written.index.tensor_paths
    tasks = {weight.name: (weight, task) for weight, task in planned.tensors}
    for file in sorted(os.listdir(folder)):
        # Others may load it instead.
        if file.endswith(".safetensors") and file not in stored.values():
            yield Check(file, WRONG, "is beside the written weights, and isn't one of them")
    for name in sorted(set(stored) - set(tasks)):
        yield Check(name, WRONG, "is written, and isn't a tensor of this merge")
    found = [
        Check("inputs", WRONG, problem) for problem in tensor_set_problems(planned.tensors, options)
    ]
    yield from found
    there = sorted(set(stored) & set(tasks))
    is_own = config.merge_method in OWN_METHODS
    count = min(len(there), len(there) if sample is None else sample) if is_own else 0
    # Evenly from the first to the last.
    chosen = [there[round(i * (len(there) - 1) / max(1, count - 1))] for i in range(count)]
    for name in [*sorted(set(tasks) - set(stored)), *chosen]:
        check = _compared(*tasks[name], config, options, masks, written)
        found.append(check)
        if check.verdict != RIGHT:
            yield check
    if any(check.verdict != RIGHT for check in found):
        return
    if not is_own:
        finding = (
            f"the {len(there)} of this merge are written; {config.merge_method} isn't computed"
        )
        yield Check("tensors", RIGHT, finding)
        return
    finding = f"{len(found)} of {len(set(stored) | set(tasks))} are what base, models and mask give"
    rounded = sum(bool(check.finding) for check in found)
    if rounded:
        finding += f", {rounded} of them up to rounding"
    if len(chosen) < len(there):
        finding += f"; {len(there) - len(chosen)} not looked at (--all looks)"
    yield Check("tensors", RIGHT, finding)


def _written(folder: str) -> LazyTensorLoader:
    files = os.listdir(folder)
    if "model.safetensors" not in files and "model.safetensors.index.json" not in files:
        if any(name.endswith(".bin") for name in files):
            raise RecipeError("the weights are pickled (.bin), which is never opened here")
        raise FileNotFoundError(f"neither model.safetensors nor its index is in {folder}")
    index = ShardedTensorIndex.from_disk(folder)
    for file in sorted(set(index.tensor_paths.values())):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            what = f"the index of the weights names {file!r}, not a safetensors file beside it"
            raise RecipeError(what) if file.endswith(".bin") else ValueError(what)
    return LazyTensorLoader(index)


def _compared(
    weight: Any,
    task: Any,
    config: MergeConfiguration,
    options: MergeOptions,
    masks: MaskSet | None,
    written: LazyTensorLoader,
) -> Check:
    place = written.index.tensor_paths.get(weight.name)
    try:
        found = written.get_tensor(weight.name) if place else None
    except Exception as error:  # whatever a damaged file makes of its reader
        return Check(weight.name, WRONG, f"{place} can't be read: {first_line(error)}")
    if masks:
        task = with_mask(task, masks)
    try:
        executor = Executor([task], math_device=options.device, storage_device="cpu")
        ((_, expected),) = executor.run(quiet=True)
    except RecipeError as error:
        return Check(weight.name, WRONG, error.message)
    except Exception as error:  # mergekit's loaders and methods raise what they like
        return Check(weight.name, UNCHECKED, f"it can't be computed: {first_line(error)}")
    # Of an optional tensor, a merge may write none.
    if expected is None or found is None:
        if expected is found:
            return Check(weight.name, RIGHT, "")
        what = "is missing in what is written" if place is None else "this merge has none of it"
        return Check(weight.name, WRONG, what)
    dtype = dtype_from_name(weight.force_dtype or config.out_dtype) or expected.dtype
    finding, is_right = difference(expected.to(dtype), found)
    return Check(weight.name, RIGHT if is_right else WRONG, finding and f"{finding} in {place}")


def difference(expected: Tensor, found: Tensor) -> tuple[str, bool]:
    """Return how a tensor differs from what it should be, and whether rounding explains it.

    The words are empty where the two are equal.
    """
    if expected.dtype != found.dtype or expected.shape != found.shape:
        shapes = [f"{t.dtype} {tuple(t.shape)}" for t in (found, expected)]
        return f"is {shapes[0]}, expected {shapes[1]}".replace("torch.", ""), False
    if are_equal(expected, found):
        return "", True
    if not found.is_floating_point():
        return f"{int((expected != found).sum())} entries differ", False
    one, other = expected.double(), found.double()
    apart = (one - other).abs()
    allowed = 2 * torch.finfo(expected.dtype).eps * one.abs() + _ROUNDING * one.abs().max()
    finding = (
        f"differs by up to {float(apart.max()):.3g} in {int((apart != 0).sum())} of "
        f"{one.numel()} entries"
    )
    # Of what is not finite, no comparison holds.
    return finding, bool((apart <= allowed).all())
