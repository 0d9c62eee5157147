"""Several processes learn one mask together: the same as one, written once."""

import json
import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import tiny
import torch

from benchmarks.architectures import inputs, made_models
from benchmarks.families import FAMILIES
from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.common.process_group import Processes, own_device, processes
from somf_mergekit.learner import tensors
from somf_mergekit.learner.engine import agreed
from somf_mergekit.learner.stopping import LearningDiverged
from somf_mergekit.prepass import prepass

pytestmark = pytest.mark.slow

# On a machine with a GPU too, gloo and the CPU are what is tested.
ENVIRONMENT = {"SOMF_PRECISION": "float32", "ACCELERATE_USE_CPU": "1"}

BY_PLACE = [
    {"filter": "q_proj", "value": "head"},
    {"filter": "k_proj", "value": "tensor"},
    {"filter": "up_proj", "value": "column"},
    {"filter": "down_proj", "value": "row"},
    {"value": "weight"},
]
BY_MEAN = [{"filter": "k_proj", "value": "none"}, {"value": "mean"}]


def learned(recipe_file, folder, count, command="learn"):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    started = tiny.run(
        sys.executable,
        *launcher,
        "-m",
        "somf_mergekit",
        command,
        recipe_file,
        folder,
        env=ENVIRONMENT,
    )
    return started


def learned_twice(recipe, engine, count, folder, monkeypatch):
    """Learn in one process, then on an engine in several; return what these have written."""
    file = tiny.write_recipe(folder / "recipe.yml", recipe)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    alone = tiny.invoke("mergekit-somf", "learn", file, folder / "one")
    assert alone.exit_code == 0, alone.output
    monkeypatch.setitem(ENVIRONMENT, "SOMF_ENGINE", engine)
    together = learned(file, folder / "several", count)
    assert together.returncode == 0, together.stderr
    return together


def losses(folder):
    rows = (folder / "training.jsonl").read_text().splitlines()
    return [[json.loads(row)[key] for row in rows] for key in ("loss", "utility", "margin")]


@pytest.mark.parametrize(
    ("count", "engine", "settings"),
    [
        (3, "resident", {}),
        # Rows that can't be dealt out evenly; entries that cover rows of several processes.
        (3, "sharded", {"granularity": BY_PLACE, "mask_rescale": BY_MEAN}),
        (2, "sharded", {"fusion": "ties", "density": 0.5}),
        (3, "sharded", {"optimizer": "adamw", "warmup": 0.0, "mask_sharing": "per_model"}),
        (2, "streaming", {"optimizer": "adamw"}),
    ],
)
def test_several_processes_learn_what_one_learns(
    count, engine, settings, family, family_recipe, tmp_path, monkeypatch
):
    utility = [
        {"prompt": row["prompt"], "answer": row["chosen"]} for row in tiny.preference_rows(6)
    ]
    recipe = family_recipe(
        utility_dataset=str(tiny.write_jsonl(tmp_path / "utility.jsonl", utility)),
        reference="redrawn",
        max_steps=4,
        # The last batch of an epoch is smaller: some processes have no pair of it.
        batch_size=10,
        epochs=2,
        held_out_share=0.5,
        **settings,
    )
    together = learned_twice(recipe, engine, count, tmp_path, monkeypatch)
    assert together.stdout.count("mask of 21 tensors") == 1
    assert together.stderr.count("needs about") == 1
    for one, other in zip(losses(tmp_path / "one"), losses(tmp_path / "several"), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    one, other = MaskSet.open(tmp_path / "one"), MaskSet.open(tmp_path / "several")
    assert other.provenance["steps"] == 4
    compared = [masks.provenance["held_out"] for masks in (one, other)]
    assert compared[0]["pairs"] == compared[1]["pairs"] == 12
    for key in ("plain_fusion", "merge"):
        assert compared[1][key] == pytest.approx(compared[0][key], rel=1e-2, abs=1e-3)
    assert one.models == other.models
    for model in one.models or (None,):
        own, theirs = one.of(model), other.of(model)
        # Tokens that no pair has stay where they start, whichever process had which pairs.
        untouched = [
            masks.entries("model.embed_tokens.weight").sub(127.5 / 256).abs().sum(dim=1) == 0
            for masks in (own, theirs)
        ]
        assert torch.equal(*untouched)
        share = untouched[0].float().mean()
        assert share == 0 if settings.get("optimizer") == "adamw" else 0.5 < share < 1
        apart = torch.cat([(own.entries(n) - theirs.entries(n)).flatten() for n in own.names()])
        assert (apart.abs() < 0.01).float().mean() > 0.98
        assert apart.mean().abs() < 1e-3


def test_several_processes_stop_with_the_mask_that_one_stops_with(
    family_recipe, tmp_path, monkeypatch
):
    recipe = family_recipe(
        safety_dataset=str(tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(60))),
        held_out_share=0.4,
        granularity="row",
        learning_rate=0.4,
        max_steps=20,
        patience=1,
        look_every=2,
    )
    learned_twice(recipe, "sharded", 3, tmp_path, monkeypatch)
    masks = [MaskSet.open(tmp_path / name) for name in ("one", "several")]
    chosen, other = (own.provenance["validation"] for own in masks)
    assert chosen == other
    assert chosen["mask_step"] <= masks[0].provenance["steps"] < 20
    looks = []
    for name in ("one", "several"):
        lines = (tmp_path / name / "training.jsonl").read_text().splitlines()
        looks.append(
            [value for line in lines for value in json.loads(line).get("look", {}).values()]
        )
    assert looks[1] == pytest.approx(looks[0], rel=1e-2, abs=1e-4)
    apart = torch.cat(
        [(masks[0].entries(n) - masks[1].entries(n)).flatten() for n in masks[0].names()]
    )
    assert (apart.abs() < 0.01).float().mean() > 0.98


def test_a_merge_in_several_processes_is_refused(family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    result = learned(file, tmp_path / "out", 2, "merge")
    assert result.returncode != 0
    assert "then merge in one process" in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


class Two(Processes):
    """This process and one whose loss is not finite."""

    def gathered(self, values):
        return [*values, (3, [7], [])]


def test_a_loss_that_is_not_finite_in_one_process_stops_all():
    with pytest.raises(LearningDiverged) as error, agreed(Two()):
        pass
    assert (error.value.step, error.value.rows) == (3, [7])
    with pytest.raises(LearningDiverged) as error, agreed(Two()):
        raise LearningDiverged(3, rows=[9, 8])
    assert error.value.rows == [7, 8, 9]
    with agreed(Processes()):
        pass


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_device("cuda") == "cuda:3"
    assert own_device("cuda:1") == "cuda:1"
    assert own_device(None) == own_device("cpu") == "cpu"
    monkeypatch.delenv("WORLD_SIZE")
    assert own_device("cuda") == "cuda"


@pytest.mark.parametrize(
    ("reported", "count", "here", "first"),
    [
        ({}, 1, 1, True),
        ({"WORLD_SIZE": "8", "RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 8, 4, False),
        ({"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 6, 2, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "4"}, 4, 4, False),
    ],
)
def test_launchers_are_understood_and_memory_is_divided(monkeypatch, reported, count, here, first):
    import psutil

    from somf_mergekit.common import machine
    from somf_mergekit.common import process_group as module

    for name, value in reported.items():
        monkeypatch.setenv(name, value)
    assert module.started() == count
    assert module.is_first() == first
    whole = psutil.virtual_memory().available
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": whole}))
    assert machine.free_memory("cpu") == whole // here


def test_a_process_waits_for_one_that_reads_for_hours(monkeypatch):
    connected = []

    def state(**options):
        connected.append(options)
        return SimpleNamespace(process_index=1, num_processes=2)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", state)
    assert processes("cpu") == Processes(1, 2)
    assert connected[0]["timeout"] >= timedelta(hours=24)


@pytest.mark.parametrize(("name", "engine"), [("Gemma 3", "sharded"), ("Mixtral", "resident")])
def test_wrappers_and_experts_are_learned_by_several(name, engine, tmp_path, monkeypatch):
    tokenizer, pairs = inputs()
    made_models(FAMILIES[name], tokenizer, tmp_path)
    data = {"safety_dataset": str(tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs))}
    steps = {"max_steps": 2, "learning_rate": 0.1, "batch_size": 4, "granularity": "weight"}
    recipe = tiny.recipe(tmp_path / "base", [tmp_path / "first"], **data, **steps)
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    assert tiny.invoke("mergekit-somf", "learn", file, tmp_path / "one").exit_code == 0
    monkeypatch.setitem(ENVIRONMENT, "SOMF_ENGINE", engine)
    started = learned(file, tmp_path / "several", 2)
    assert started.returncode == 0, started.stderr
    one, other = MaskSet.open(tmp_path / "one"), MaskSet.open(tmp_path / "several")
    assert one.names() == other.names()
    apart = torch.cat([(one.entries(n) - other.entries(n)).flatten() for n in one.names()])
    assert (apart.abs() < 0.01).float().mean() > 0.98


def test_processes_that_found_other_data_are_refused():
    class Three(Processes):
        def gathered(self, values):
            (own,) = values
            return [own, own, {**own, "data": "2"}]

    planned = SimpleNamespace(models=["a", "b"])
    prepass._check_agreement(planned, {"data": "1"}, Processes())
    with pytest.raises(RecipeError, match="process 2 has other data than process 0"):
        prepass._check_agreement(planned, {"data": "1"}, Three(0, 3))


def test_what_the_first_process_does_ends_all_where_it_fails():
    class OfFirst(Processes):
        def of_first(self, value):
            return value if self.is_first else (None, "the disk is full")

    def fails():
        raise RecipeError("the disk is full")

    for rank in (0, 1):
        with pytest.raises(RecipeError, match="the disk is full"):
            OfFirst(rank, 2).first_does(fails)
    assert OfFirst(0, 2).first_does(lambda: 7) == Processes().first_does(lambda: 7) == 7


GOES_BAD = """
import math, os, sys
from somf_mergekit.learner import engine, passes
from somf_mergekit.common.process_group import Processes
rank, how = int(os.environ["RANK"]), os.environ["HOW"]
real = passes.Passes._pair_losses
def losses_of(self, rows, *arguments):
    losses, margins = real(self, rows, *arguments)
    for place, row in enumerate(rows):
        if how == "loss" and self.setup.pairs[row].row == 11:
            losses = losses.clone()
            losses[place] *= math.nan
    return losses, margins
passes.Passes._pair_losses = losses_of
update = engine.Updates._update
def updated(self, tensor, gradient):
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "gradient" and self._step == 2 and tensor.name == name and rank == 1:
        gradient.view(-1)[0] = math.nan
    update(self, tensor, gradient)
engine.Updates._update = updated
from somf_mergekit.cli import main
main()
"""


@pytest.mark.parametrize(("how", "engine"), [("loss", "resident"), ("gradient", "sharded")])
def test_what_one_process_sees_stops_all_and_is_reported_by_the_first(
    how, engine, family, family_recipe, tmp_path, monkeypatch
):
    settings = {"max_steps": 6, "mask_rescale": "none"}
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe(**settings))
    (tmp_path / "bad.py").write_text(GOES_BAD)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [tmp_path / "bad.py", "learn", file, tmp_path / "mask"]
    environment = ENVIRONMENT | {"SOMF_ENGINE": engine, "HOW": how, "SOMF_CHECKPOINT_MINUTES": "0"}
    result = tiny.run(sys.executable, *launcher, *script, env=environment)
    assert result.returncode != 0
    text = " ".join(result.stderr.split())
    stored = MaskSet.open(tmp_path / "mask.last-good")
    step = stored.provenance["steps"]
    if how == "loss":
        assert f"NaN or infinite at step {step + 1} of 6;" in text
        assert f"the loss on row 11 of {family / 'pairs.jsonl'} (counted from 0)" in text
    else:
        assert "a gradient became NaN or infinite at step 3 of 6, that of model.layers.1" in text
        assert step == 2
    # The mask is that of a learning of the same schedule that was left off there.
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    real = tensors.MaskedTensor.update
    monkeypatch.setattr(
        tensors.MaskedTensor,
        "update",
        lambda self, given, number, *rest: number < step and real(self, given, number, *rest),
    )
    alone = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    one = MaskSet.open(tmp_path / "one")
    apart = torch.cat([(one.entries(n) - stored.entries(n)).flatten() for n in one.names()])
    assert (apart.abs() < 0.01).float().mean() > 0.98
    assert (one.entries("lm_head.weight") - 0.5).abs().max() > 0.02 * step


def test_shares_are_all_of_the_rows():
    rows = list(range(7))
    shares = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert os.environ.get("WORLD_SIZE") is None
