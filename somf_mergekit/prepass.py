"""The pre-pass: a planned merge in, a mask artifact out."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import click
import torch
from mergekit.graph import Executor

from . import machine
from .errors import RecipeError, raise_together
from .learner.loop import LearningProblem, LossNotFinite, StepReport, learn_logits, step_count
from .learner.model import learning_model
from .masks import HISTORY_FILE, MASKS_FILE, MaskSet, write_masks
from .method import mask_shape_problem
from .preferences import (
    EncodedPair,
    dataset_rows,
    encoded_pairs,
    preference_pairs,
    sampled_pairs,
)
from .recipe import Settings
from .sources import (
    PlannedMerge,
    checkpoint_problems,
    content_fingerprint,
    loaded_tensors,
    planned_shapes,
    vocabulary_aligned,
)

# Settings that choose how a learned mask is used, not which mask is learned.
_USE_ONLY = ("mask", "mask_kind")
_CURVE_STEPS = 10
CANT_BE_MADE = "This merge can't be made"


@dataclass(frozen=True)
class SafetyData:
    """Tokenised pairs of a recipe.

    Attributes:
        pairs: in the order of the first epoch.
        dropped: what was left out and why, in words; empty where nothing was.
    """

    pairs: list[EncodedPair]
    dropped: str


@dataclass(frozen=True)
class Forecast:
    """What learning a recipe's mask would take, at most: told without loading weights.

    Attributes:
        tensors: tensors that may get a mask.
        entries: mask entries of all of them.
        pairs: preference pairs.
        steps: optimiser steps.
        micro_batch: pairs that go through the model at once.
        memory: bytes for weights, task vectors, logits, gradients and optimiser.
    """

    tensors: int
    entries: int
    pairs: int
    steps: int
    micro_batch: int
    memory: int


def mask_for(planned: PlannedMerge, folder: str) -> MaskSet:
    """Return the mask of a planned merge: the one given, the one found in ``folder``, or a new one.

    Raises:
        RecipeError: what is wrong with the models, the data or the mask, all of it together.
    """
    settings = planned.settings
    if settings.mask:
        return _given_mask(planned, settings.mask)
    data = checked_data(planned)
    fingerprint = learning_fingerprint(planned, data)
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        differing = _differences(MaskSet.open(folder).provenance, fingerprint)
        if not differing:
            _say(planned, f"somf: reusing the mask learned before in {folder}")
            return MaskSet.open(folder)
        kept = _moved_aside(folder)
        _say(
            planned,
            f"somf: the mask in {folder} was learned with other {', '.join(differing)}; it is "
            f"kept as {kept}, and a new one is learned",
        )
    return _learned_mask(planned, folder, data, fingerprint)


def checked_data(planned: PlannedMerge) -> SafetyData:
    """Return the safety data after checking it and the models against each other.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    problems = checkpoint_problems(planned)
    try:
        data = _safety_data(planned)
    except RecipeError as error:
        raise_together([*problems, error.message], CANT_BE_MADE)
        raise
    raise_together(problems, CANT_BE_MADE)
    return data


def forecast(planned: PlannedMerge, data: SafetyData) -> Forecast:
    """Return what learning the mask of a recipe would take."""
    settings = planned.settings
    shapes = planned_shapes(planned)
    total = sum(math.prod(shape) for shape in shapes.values())
    return Forecast(
        tensors=len(shapes),
        entries=total,
        pairs=len(data.pairs),
        steps=step_count(settings, len(data.pairs)),
        micro_batch=_micro_batch(planned, settings),
        # Merged weight, task vector, logits, weight gradient, and Adam's two moments in float32;
        # the base in the recipe's dtype, float32 at most.
        memory=total * 7 * 4,
    )


def learning_fingerprint(planned: PlannedMerge, data: SafetyData) -> dict[str, Any]:
    """Return everything that decides a learned mask, as JSON."""
    settings = planned.settings.model_dump(exclude=set(_USE_ONLY))
    resolved = []
    for weight, task in planned.tensors:
        shared = {k: v for k, v in task.parameters.items() if k not in _USE_ONLY and v is not None}
        per_model = [
            sorted((k, v) for k, v in task.input_parameters.get(model, {}).items() if v is not None)
            for model in task.model_order
        ]
        resolved.append([weight.name, sorted(shared.items(), key=str), per_model])
    return {
        "models": [content_fingerprint(model) for model in planned.models],
        "data": _digest([[p.prompt, p.chosen, p.rejected] for p in data.pairs]),
        "settings": {k: v for k, v in settings.items() if not k.startswith("safety_")},
        "parameters of the tensors": _digest(resolved),
        "dtype": planned.config.dtype or "as stored",
        "versions": _versions(),
    }


def _learned_mask(
    planned: PlannedMerge, folder: str, data: SafetyData, fingerprint: dict[str, Any]
) -> MaskSet:
    settings = planned.settings
    if data.dropped:
        _say(planned, f"somf: rows of the safety dataset left out: {data.dropped}")
    device = planned.options.device or "cpu"
    model, tensors, aliases = learning_model(
        planned.out_config,
        loaded_tensors(planned),
        settings,
        {weight.name for weight, _ in planned.tensors if planned.may_get_mask(weight.name)},
        device,
        planned.options.trust_remote_code,
    )
    problem = LearningProblem(
        model=model,
        tensors=tensors,
        pairs=data.pairs,
        settings=settings,
        autocast=torch.bfloat16 if planned.config.dtype in ("bfloat16", "float16") else None,
        micro_batch=_micro_batch(planned, settings),
    )
    history: list[dict[str, Any]] = []

    def artifact(place: str) -> MaskSet:
        return write_masks(
            place,
            {t.name: torch.sigmoid(t.logits).cpu() for t in tensors},
            aliases=aliases,
            provenance=_provenance(planned, data, fingerprint, history, tensors),
            history=history,
        )

    try:
        _learn_with_progress(problem, history, planned.options.quiet)
    except LossNotFinite as error:
        kept = _free_name(f"{folder}.last-good")
        artifact(kept)
        raise RecipeError(
            f"the loss became NaN or infinite at step {error.step + 1} of "
            f"{step_count(settings, len(data.pairs))}; the mask as it was before is kept in {kept} "
            f"({MASKS_FILE}, {HISTORY_FILE}). Try a smaller learning_rate, or another dtype."
        ) from error
    return artifact(folder)


def _learn_with_progress(
    problem: LearningProblem, history: list[dict[str, Any]], quiet: bool
) -> None:
    from tqdm import tqdm

    steps = step_count(problem.settings, len(problem.pairs))
    compared = min(len(problem.pairs), steps * problem.settings.batch_size)
    reference_bar = tqdm(total=compared, desc="Reference", unit="pair", disable=quiet, leave=False)
    step_bar = None

    def on_reference(done: int) -> None:
        nonlocal step_bar
        reference_bar.update(done - reference_bar.n)
        if done == compared:
            reference_bar.close()
            step_bar = tqdm(total=steps, desc="Learning mask", unit="step", disable=quiet)

    def on_step(report: StepReport) -> None:
        history.append(asdict(report))
        if step_bar is not None:
            step_bar.set_postfix(loss=f"{report.loss:.4f}", accuracy=f"{report.accuracy:.2f}")
            step_bar.update()

    try:
        learn_logits(problem, on_step, on_reference)
    finally:
        reference_bar.close()
        if step_bar is not None:
            step_bar.close()


def _safety_data(planned: PlannedMerge) -> SafetyData:
    settings = planned.settings
    source = settings.safety_dataset or ""
    rows = dataset_rows(source, settings.safety_split, settings.safety_config)
    pairs, left_out = preference_pairs(rows, source)
    chosen = sampled_pairs(pairs, settings.safety_samples, settings.seed)
    encoded, cut = encoded_pairs(chosen, _tokenizer(planned), settings.max_length, source)
    return SafetyData(encoded, ", ".join(filter(None, (str(left_out), str(cut)))))


def _tokenizer(planned: PlannedMerge) -> Any:
    from transformers import AutoTokenizer

    if planned.tokenizer_task is not None:
        executor = Executor([planned.tokenizer_task])
        for _, info in executor.run(quiet=True):
            return info.tokenizer
    base = planned.base_model.model
    try:
        return AutoTokenizer.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=planned.options.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"the base {base} has no tokenizer that loads: {error}") from error


def _given_mask(planned: PlannedMerge, source: str) -> MaskSet:
    masks = MaskSet.open(source)
    problems = checkpoint_problems(planned)
    if not any(weight.name in masks for weight, _ in planned.tensors):
        problems.append(
            f"mask {source}: none of its {len(masks.names())} tensors is in this merge (it has "
            f"{', '.join(masks.names()[:2])} ...): the mask is of another model"
        )
    aligned = vocabulary_aligned(planned)
    for name, shape in planned_shapes(planned).items():
        if name in masks and name not in aligned:
            problem = mask_shape_problem(name, masks.shape(name), shape, source)
            problems += [problem] if problem else []
    raise_together(problems, CANT_BE_MADE)
    return masks


def _micro_batch(planned: PlannedMerge, settings: Settings) -> int:
    # Half of what is free: the other half is for weights, logits and the optimiser.
    free = machine.free_memory(planned.options.device or "cpu") // 2
    return machine.micro_batch_pairs(
        planned.out_config, settings.max_length, settings.batch_size, free
    )


def _provenance(
    planned: PlannedMerge,
    data: SafetyData,
    fingerprint: dict[str, Any],
    history: Sequence[dict[str, Any]],
    tensors: Sequence[Any],
) -> dict[str, Any]:
    settings = planned.settings
    return {
        "recipe": planned.recipe,
        "base_model": str(planned.base_model),
        "models": dict(zip(map(str, planned.models), fingerprint["models"], strict=True)),
        "dataset": {
            "source": settings.safety_dataset,
            "split": settings.safety_split,
            "config": settings.safety_config,
            "pairs": len(data.pairs),
            "left_out": data.dropped,
            "fingerprint": fingerprint["data"],
        },
        "settings": settings.model_dump(),
        "seed": settings.seed,
        "steps": len(history),
        "tensors": len(tensors),
        "entries": sum(tensor.logits.numel() for tensor in tensors),
        "training": {
            "first_steps": _curve_mean(history[:_CURVE_STEPS]),
            "last_steps": _curve_mean(history[-_CURVE_STEPS:]),
        },
        "versions": _versions(),
        "fingerprint": fingerprint,
    }


def _curve_mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    return {key: sum(r[key] for r in rows) / len(rows) for key in ("loss", "accuracy", "margin")}


def _versions() -> dict[str, str]:
    names = ("somf-mergekit", "mergekit", "torch", "transformers")
    return {name: version(name) for name in names}


def _differences(provenance: dict[str, Any], fingerprint: dict[str, Any]) -> list[str]:
    before = provenance.get("fingerprint", {})
    return [key for key, value in fingerprint.items() if before.get(key) != value]


def _moved_aside(folder: str) -> str:
    kept = _free_name(f"{folder}.before")
    os.replace(folder, kept)
    return kept


def _free_name(wanted: str) -> str:
    name, number = wanted, 1
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _say(planned: PlannedMerge, text: str) -> None:
    if not planned.options.quiet:
        click.echo(text, err=True)
