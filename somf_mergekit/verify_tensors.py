"""Tensors that a merge has written, compared with what base, models and mask give."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.options import MergeOptions
from torch import Tensor

from .errors import RecipeError, first_line
from .groups import are_equal
from .masks import MaskSet
from .plan import PlannedMerge
from .planner import planned_merge, with_mask

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


def tensor_checks(
    folder: str,
    config: MergeConfiguration,
    masks: MaskSet | None,
    options: MergeOptions,
    sample: int | None,
) -> Iterator[Check]:
    """Yield what is found of the written tensors: those that are wrong, then all together.

    Each is computed by mergekit's loaders and this package's method, one at a time.

    Args:
        folder: what the merge has written.
        config: its recipe.
        masks: what it is masked with, where it is.
        options: mergekit's, as the merge was made with.
        sample: how many tensors are computed; None for all.
    """
    try:
        planned = planned_merge(config, options)
    except RecipeError as error:
        yield in_a_line("tensors", UNCHECKED, error.message)
        return
    try:
        written = _written(folder)
    except RecipeError as error:
        yield in_a_line("tensors", UNCHECKED, error.message)
        return
    except Exception as error:  # whatever a damaged file makes of its reader
        yield in_a_line("tensors", WRONG, f"the written weights can't be read: {first_line(error)}")
        return
    yield from _strays(folder, written)
    tasks = {weight.name: (weight, task) for weight, task in planned.tensors}
    stored = set(written.index.tensor_paths)
    for name in sorted(stored - set(tasks)):
        yield Check(name, WRONG, "is written, and no tensor of this merge")
    there = sorted(stored & set(tasks))
    chosen = there if sample is None else _spread(there, sample)
    verdicts = {RIGHT: 0, WRONG: 0, UNCHECKED: 0}
    rounded = 0
    for name in [*sorted(set(tasks) - stored), *chosen]:
        found = _compared(*tasks[name], planned, masks, written)
        verdicts[found.verdict] += 1
        rounded += found.verdict == RIGHT and bool(found.told)
        if found.verdict != RIGHT:
            yield found
    told = f"{verdicts[RIGHT]} of {len(stored | set(tasks))} are what base, models and mask give"
    told += f", {rounded} of them up to rounding" * bool(rounded)
    told += f"; {len(there) - len(chosen)} not looked at (--all looks)" * (len(chosen) < len(there))
    if not verdicts[WRONG] and not verdicts[UNCHECKED]:
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


def _strays(folder: str, written: LazyTensorLoader) -> Iterator[Check]:
    """Yield the weights that are no part of what is written, and that others may load instead."""
    own = set(written.index.tensor_paths.values())
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and name not in own:
            yield Check(name, WRONG, "is beside the written weights, and none of them")


def _compared(
    weight: Any, task: Any, planned: PlannedMerge, masks: MaskSet | None, written: LazyTensorLoader
) -> Check:
    place = written.index.tensor_paths.get(weight.name)
    try:
        found = written.get_tensor(weight.name) if place else None
    except Exception as error:  # whatever a damaged file makes of its reader
        return in_a_line(weight.name, WRONG, f"{place} can't be read: {first_line(error)}")
    options = planned.options
    if masks:
        task = with_mask(task, masks.path)
    try:
        executor = Executor([task], math_device=options.device, storage_device="cpu")
        ((_, expected),) = executor.run(quiet=True)
    except RecipeError as error:
        return in_a_line(weight.name, WRONG, error.message)
    except Exception as error:  # mergekit's loaders and methods raise what they like
        return in_a_line(weight.name, UNCHECKED, f"it can't be computed: {first_line(error)}")
    # Of an optional tensor, a merge may write none.
    if expected is None or found is None:
        missing = "is missing in what is written" if place is None else "is none of this merge"
        return Check(weight.name, RIGHT if expected is found else WRONG, missing)
    dtype = dtype_from_name(weight.force_dtype or planned.config.out_dtype) or expected.dtype
    told, is_right = difference(expected.to(dtype), found)
    return Check(weight.name, RIGHT if is_right else WRONG, f"{told} in {place}" * bool(told))


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
    largest = float(apart.max())
    step = torch.finfo(expected.dtype).eps
    allowed = 2 * step * one.abs() + _ROUNDING * float(one.abs().max())
    told = f"differs by up to {largest:.3g} in {int((apart != 0).sum())} of {one.numel()} entries"
    # Of what is not finite, no comparison holds.
    return told, bool((apart <= allowed).all())


def _spread(names: list[str], count: int) -> list[str]:
    """Return ``count`` names, evenly from the first to the last."""
    if count >= len(names):
        return names
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def in_a_line(subject: str, verdict: str, told: str) -> Check:
    """Return a check whose words, of several lines perhaps, are brought into one."""
    return Check(subject, verdict, " ".join(told.split()))
