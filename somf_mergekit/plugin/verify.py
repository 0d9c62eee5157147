"""Check what a merge has written: its mask, whose that is, which tensors, and what is in them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from torch import Tensor

from ..common import machine
from ..common.errors import RecipeError, first_line
from ..fusion.groups import are_equal
from ..mask.artifact import MaskSet
from ..prepass.task_vectors import content_fingerprint
from ..prepass.tensor_sets import tensor_set_problems
from ..recipe import settings as recipe
from ..recipe.model_check import check_models
from ..recipe.validate import OWN_METHODS, read_recipe
from .planner import unchecked_plan, with_mask

RECIPE_FILE = "mergekit_config.yml"
RIGHT, WRONG, UNCHECKED = "right", "WRONG", "not checked"
# Sums over a mask come out otherwise on another machine, or with another number of threads.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: what.
        verdict: RIGHT, WRONG or UNCHECKED.
        told: what was found, in one line.
    """

    subject: str
    verdict: str
    told: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "told", " ".join(self.told.split()))


def checks(folder: str, options: MergeOptions, sample: int | None) -> Iterator[Check]:
    """Yield what is found of a merge's output, one check after another.

    Of a method of mergekit's own, only which tensors are there is checked.

    Args:
        folder: what the merge has written.
        options: mergekit's, as the merge was made with.
        sample: how many tensors are computed once more; None for all.
    """
    config, masks = None, None
    file = os.path.join(folder, RECIPE_FILE)
    try:
        config = read_recipe(file, [method.spec.name for method in registry.registered_methods()])
        yield Check("recipe", RIGHT, f"{RECIPE_FILE}, {config.merge_method}")
    except RecipeError as error:
        verdict = WRONG if os.path.exists(file) else UNCHECKED
        yield Check("recipe", verdict, f"{error.message}; without it no tensor can be computed")
    if config is None or config.merge_method == recipe.METHOD_NAME:
        try:
            masks = MaskSet.open(machine.machine_setting("work_dir") or folder)
            yield _intact(masks)
        except RecipeError as error:
            yield Check("artifact", WRONG, error.message)
    if config is None:
        return
    LoaderCache().setup(options=options)
    if masks:
        yield _models(config, masks)
    elif config.merge_method == recipe.METHOD_NAME:
        yield Check("tensors", UNCHECKED, "there is no mask to compute them with")
        return
    yield from _tensor_checks(folder, config, masks, options, sample)


def _intact(masks: MaskSet) -> Check:
    problems = masks.problems()
    if problems:
        return Check("artifact", WRONG, "; ".join(problems))
    told = f"{len(masks.names())} tensors in {masks.path}"
    return Check("artifact", RIGHT, f"{told}, as their checksums say")


def _models(config: MergeConfiguration, masks: MaskSet) -> Check:
    """Compare the models that the recipe names with those that the mask was learned with."""
    recorded = masks.provenance.get("models")
    if not isinstance(recorded, dict) or not recorded:
        return Check("models", UNCHECKED, "the mask does not tell what it was learned with")
    base = recorded.get(str(masks.provenance.get("base_model")))
    missing: list[str] = []
    other: list[str] = []
    found: list[str] = []
    for model in sorted(config.referenced_models(), key=str):
        try:
            digest = content_fingerprint(model)
        except Exception as error:  # a missing model comes in many ways
            missing.append(f"{model} is not at hand ({first_line(error)})")
            continue
        known = [base] if model == config.base_model else recorded.values()
        (found if digest in known else other).append(str(model))
    if other:
        what = f"the mask was learned with other models than {', '.join(other)}"
        if (config.parameters or {}).get("mask"):
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
    own = set(written.index.tensor_paths.values())
    for file in sorted(os.listdir(folder)):
        # Others may load it instead.
        if file.endswith(".safetensors") and file not in own:
            yield Check(file, WRONG, "is beside the written weights, and none of them")
    tasks = {weight.name: (weight, task) for weight, task in planned.tensors}
    lost = tensor_set_problems(planned.tensors, options)
    for problem in lost:
        yield Check("inputs", WRONG, problem)
    stored = set(written.index.tensor_paths)
    for name in sorted(stored - set(tasks)):
        yield Check(name, WRONG, "is written, and no tensor of this merge")
    computed = config.merge_method in OWN_METHODS
    there = sorted(stored & set(tasks))
    chosen = _spread(there, len(there) if sample is None else sample) if computed else []
    verdicts = {RIGHT: 0, WRONG: len(lost), UNCHECKED: 0}
    rounded = 0
    for name in [*sorted(set(tasks) - stored), *chosen]:
        found = _compared(*tasks[name], config, options, masks, written)
        verdicts[found.verdict] += 1
        rounded += found.verdict == RIGHT and bool(found.told)
        if found.verdict != RIGHT:
            yield found
    if verdicts[WRONG] or verdicts[UNCHECKED]:
        return
    if not computed:
        told = f"the {len(there)} of this merge are written; {config.merge_method} is not computed"
        yield Check("tensors", RIGHT, told)
        return
    told = f"{verdicts[RIGHT]} of {len(stored | set(tasks))} are what base, models and mask give"
    if rounded:
        told += f", {rounded} of them up to rounding"
    if len(chosen) < len(there):
        told += f"; {len(there) - len(chosen)} not looked at (--all looks)"
    yield Check("tensors", RIGHT, told)


def _written(folder: str) -> LazyTensorLoader:
    files = os.listdir(folder)
    if "model.safetensors" not in files and "model.safetensors.index.json" not in files:
        if any(name.endswith(".bin") for name in files):
            raise RecipeError("the weights are pickled (.bin), which is never opened here")
        raise FileNotFoundError(f"neither model.safetensors nor its index is in {folder}")
    index = ShardedTensorIndex.from_disk(folder)
    for file in sorted(set(index.tensor_paths.values())):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            what = f"the index of the weights names {file!r}, no safetensors beside it"
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
        task = with_mask(task, masks.path)
    try:
        executor = Executor([task], math_device=options.device, storage_device="cpu")
        ((_, expected),) = executor.run(quiet=True)
    except RecipeError as error:
        return Check(weight.name, WRONG, error.message)
    except Exception as error:  # mergekit's loaders and methods raise what they like
        return Check(weight.name, UNCHECKED, f"it can't be computed: {first_line(error)}")
    # Of an optional tensor, a merge may write none.
    if expected is None or found is None:
        missing = "is missing in what is written" if place is None else "is none of this merge"
        return Check(weight.name, RIGHT if expected is found else WRONG, missing)
    dtype = dtype_from_name(weight.force_dtype or config.out_dtype) or expected.dtype
    told, is_right = difference(expected.to(dtype), found)
    return Check(weight.name, RIGHT if is_right else WRONG, told and f"{told} in {place}")


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
    told = (
        f"differs by up to {float(apart.max()):.3g} in {int((apart != 0).sum())} of "
        f"{one.numel()} entries"
    )
    # Of what is not finite, no comparison holds.
    return told, bool((apart <= allowed).all())


def _spread(names: list[str], count: int) -> list[str]:
    """Return ``count`` names, evenly from the first to the last."""
    if count >= len(names):
        return names
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
