"""What tests of the learner learn: a tiny Llama, two random task vectors, and random pairs."""

import contextlib
import copy
import dataclasses

import pytest
import tiny
import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.options import MergeOptions

from somf_mergekit.common.model_classes import Slice
from somf_mergekit.common.process_group import ALONE
from somf_mergekit.data.encoding import EncodedPair
from somf_mergekit.fusion.merges import AutogradMerge, LinearMerge
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.learner import engine, loop
from somf_mergekit.learner.parts import Learned, Parts
from somf_mergekit.learner.tensors import MaskedTensor
from somf_mergekit.learner.training_setup import TrainingSetup
from somf_mergekit.mask.granularity import Storage, mask_layout
from somf_mergekit.plugin.merge_check import checked_merge
from somf_mergekit.prepass.forecast import forecast
from somf_mergekit.prepass.training import training_setup
from somf_mergekit.recipe.settings import Settings
from somf_mergekit.recipe.validate import read_recipe

VOCABULARY = 64


def make_pairs(count=12, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    return [
        EncodedPair(tokens(3, 9), tokens(2, 7), tokens(2, 7), 100 + number)
        for number in range(count)
    ]


TIES = {"weight": {1: 0.5, 2: 0.5}, "density": {1: 0.6, 2: 0.6}}


@contextlib.contextmanager
def stopped_before(step):
    """Learning in this block stops before a step, counted from 0; it has to come there."""
    real = loop.learning_rate_multiplier

    class Stop(Exception):
        pass

    def stopping(at, *schedule):
        if at == step:
            raise Stop
        return real(at, *schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate_multiplier", stopping)
        with pytest.raises(Stop):
            yield


def make_utility(count=6, seed=9):
    return [EncodedPair(pair.prompt, pair.chosen) for pair in make_pairs(count, seed)]


def make_setup(
    micro_batch=4,
    fusion=None,
    autocast=None,
    runs=engine.ResidentEngine,
    layers=2,
    tied=False,
    **parameters,
):
    """A tiny Llama, two random task vectors, and random pairs and utility examples."""
    values = {"safety_dataset": "x", "max_steps": 4, "learning_rate": 0.1, "batch_size": 4}
    values |= parameters
    settings = Settings(**values)
    base = tiny.tiny_llama(0, VOCABULARY, layers=layers, tied=tied)
    others = {seed: tiny.perturbed(base, seed) for seed in (1, 2)}
    model = copy.deepcopy(base).eval().requires_grad_(False)
    is_shared = settings.mask_sharing == "shared"
    models = (tuple(others),) if is_shared else tuple((number,) for number in others)
    masked = []
    for name, weight in model.named_parameters():
        start = base.get_parameter(name).detach().clone()
        changed = {n: other.get_parameter(name).detach() for n, other in others.items()}
        if fusion:
            entries = [TensorEntry("base", start, True)]
            entries += [TensorEntry(number, tensor) for number, tensor in changed.items()]
            group = TensorGroup(tuple(entries), TensorMetadata(name=name))
            values = {"fusion": fusion, "seed": 0, **TIES}
            merge = AutogradMerge(group, values, models)
        else:
            deltas = (sum(0.5 * (changed[n] - start) for n in own) for own in models)
            merge = LinearMerge(start, tuple(deltas))
        shape, has_vocabulary = tuple(weight.shape), VOCABULARY in weight.shape
        layout = mask_layout(settings.granularity, name, shape, Storage(8), has_vocabulary)
        is_adamw = settings.optimizer == "adamw"
        masks = (
            Learned(
                torch.full(layout.shape, settings.init_logit),
                torch.zeros(2, *layout.shape) if is_adamw else None,
            )
            for _ in models
        )
        parts = Parts(start, merge, tuple(masks))
        masked.append(
            MaskedTensor(
                name=name,
                models=models,
                parameter=weight,
                slice=Slice(name),
                shard=Shard(tuple(weight.shape)),
                parts=parts,
                layout=layout,
                temperature=settings.temperature,
                rescale=settings.mask_rescale,
                seed=settings.seed,
                init_logit=settings.init_logit,
                learning_rate=settings.learning_rate,
                is_noisy=settings.mask_noise == "concrete",
            )
        )
    utility = make_utility() if settings.utility_dataset else []
    return TrainingSetup(
        runs(model, masked, [], autocast), masked, make_pairs(), utility, settings, micro_batch
    )


def shared(group, factor):
    """The factor of one mask of all models."""
    own = (factor,)
    return {entry.id: own for entry in group.non_base}


def trajectory(setup):
    """Learn; return losses and logits."""
    reports = []
    loop.learn_logits(setup, reports.append, lambda done, total: None)
    return [r.loss for r in reports], [own.clone() for t in setup.tensors for _, own in t.wholes()]


TRAJECTORIES = {
    "defaults": {},
    "no rescale": {"mask_rescale": "none", "temperature": 0.8, "init_logit": 1.0},
    "reference merged": {"reference": "merged", "mask_rescale": "none", "beta": 0.5},
    "reference base": {"reference": "base"},
    "reference redrawn": {"reference": "redrawn"},
    "expected mask": {"mask_noise": "none", "mask_rescale": "none"},
    "expected mask by rows": {"mask_noise": "none", "granularity": "row", "reference": "redrawn"},
    "adamw, expected mask": {"mask_noise": "none", "optimizer": "adamw", "objective": "dpo"},
    "ties, expected mask": {"mask_noise": "none", "fusion": "ties"},
    "dpo_norm": {"objective": "dpo_norm"},
    "ipo": {"objective": "ipo", "beta": 0.2},
    "hinge": {"objective": "hinge", "beta": 0.5},
    "sft": {"objective": "sft"},
    "dpo with sft": {"sft_weight": 0.5},
    "ipo with sft": {"objective": "ipo", "beta": 0.5, "sft_weight": 2.0},
    "utility": {"utility_dataset": "y", "utility_weight": 3.0, "max_steps": 2},
    "ties": {"fusion": "ties"},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "head": {"granularity": "head"},
    "tensor": {"granularity": "tensor", "mask_rescale": "none"},
    "adamw": {"optimizer": "adamw", "objective": "dpo", "warmup": 0.0},
    "adamw, clipped, by rows": {"optimizer": "adamw", "beta": 40.0, "granularity": "row"},
    "adamw, ties": {"optimizer": "adamw", "objective": "dpo", "fusion": "ties"},
    "ties by rows": {"fusion": "ties", "granularity": "row"},
    "rows and columns": {"granularity": "row_column"},
    "rows and columns, no rescale": {"granularity": "row_column", "mask_rescale": "none"},
    "rows and columns, adamw": {
        "granularity": "row_column",
        "optimizer": "adamw",
        "objective": "dpo",
        "mask_noise": "none",
    },
    "rows and columns, ties": {"granularity": "row_column", "fusion": "ties", "max_steps": 2},
    "per model": {"mask_sharing": "per_model", "reference": "redrawn"},
    "per model, by rows": {"mask_sharing": "per_model", "granularity": "row"},
    "per model, rows and columns": {
        "mask_sharing": "per_model",
        "granularity": "row_column",
        "mask_noise": "none",
    },
    "per model, adamw": {
        "mask_sharing": "per_model",
        "optimizer": "adamw",
        "objective": "dpo",
        "max_steps": 2,
    },
    "per model, ties": {"mask_sharing": "per_model", "fusion": "ties"},
}
# Those in which engines have something else to do: the other objectives are the same to them.
FOR_ENGINES = {
    name: TRAJECTORIES[name]
    for name in (
        "defaults",
        "reference redrawn",
        "expected mask by rows",
        "sft",
        "utility",
        "ties",
        "row",
        "rows and columns",
        "rows and columns, ties",
        "per model",
        "per model, by rows",
        "per model, adamw",
        "per model, ties",
        "head",
        "adamw",
        "adamw, clipped, by rows",
        "adamw, ties",
    )
}


# Two adapters of other ranks, scales and layers.
FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
SECOND = {
    "r": 3,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"up_proj": 9},
}


def adapter(base, folder, seed, **options):
    # Else PEFT stores a whole head beside what an adapter changes of it.
    return tiny.save_adapter(base, folder, seed, save_embedding_layers=False, **options)


def adapter_recipe(root, *models, **parameters):
    """The recipe of a merge of ``adapted``'s adapters, or of others on its base."""
    base = root / "base"
    values = {"max_steps": 4, "learning_rate": 0.1, "batch_size": 4, "max_length": 48}
    values |= {"safety_dataset": str(root / "pairs.jsonl"), **parameters}
    models = models or (root / "first", root / "second")
    specialists = [f"{base}+{model}" for model in models]
    return tiny.recipe(base, specialists, weights=[0.7, 0.4][: len(models)], **values)


def adapter_plan(root, content, engine=None, **machine):
    """The checked plan of a recipe with adapters, and what its masks are learned from."""
    options = MergeOptions(lora_merge_cache=str(root / "cache"), quiet=True)
    checked = checked_merge(read_recipe(content), options)
    planned = tiny.on_machine(checked.planned, engine=engine, **machine)
    return planned, checked.inputs


def adapters_learned(root, folder, machine=(), engine="factored", forecast_as=(), **parameters):
    """Losses and logits of a training run of ``adapter_recipe``."""
    content = adapter_recipe(root, **parameters)
    machine = {"micro_batch_size": 2, "precision": "float32", **dict(machine)}
    planned, inputs = adapter_plan(root, content, engine, **machine)
    expected = dataclasses.replace(forecast(planned, inputs.data), **dict(forecast_as))
    assert expected.engine == engine
    with contextlib.ExitStack() as ending:
        _, setup, ways = training_setup(planned, str(folder), inputs, expected, ALONE, ending)
    assert ways["engine"] == engine
    return trajectory(setup)
