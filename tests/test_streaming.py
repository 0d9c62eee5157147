"""The engine that brings one layer at a time: the same results, less memory, clear refusals."""

import copy
import dataclasses
import json
import math
import os
import resource
import shutil

import pytest
import tiny
import torch
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from setups import FOR_ENGINES, VOCABULARY, make_setup, make_utility, trajectory

from somf_mergekit.common import machine
from somf_mergekit.common.errors import RecipeError
from somf_mergekit.data.logprobs import token_batch
from somf_mergekit.learner import engine, streaming
from somf_mergekit.learner.layered import LayeredModel, StreamingImpossible
from somf_mergekit.learner.parts import Content, State
from somf_mergekit.learner.stores import MappedFiles, PinnedMemory
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass import training
from somf_mergekit.prepass.forecast import forecast
from somf_mergekit.prepass.learning_data import SafetyData, checked_data
from somf_mergekit.recipe.validate import read_recipe


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", FOR_ENGINES)
def test_trajectory_is_that_of_the_resident_engine_bit_for_bit(name, autocast):
    changes = {"max_steps": 3, "micro_batch": 2, "autocast": autocast} | FOR_ENGINES[name]
    losses, logits = trajectory(make_setup(**changes))
    other_losses, other = trajectory(make_setup(runs=streaming.StreamingEngine, **changes))
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(logits, other, strict=True))


@pytest.mark.parametrize("changes", [{}, {"granularity": "row"}, {"fusion": "ties"}], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("runs", [engine.ResidentEngine, streaming.StreamingEngine])
def test_entries_without_a_gradient_of_their_own_stay(runs, micro_batch, changes):
    setup = make_setup(runs=runs, micro_batch=micro_batch, max_steps=3, **changes)
    trajectory(setup)
    seen = {t for p in setup.pairs for t in [*p.prompt, *p.chosen, *p.rejected]}
    unseen = sorted(set(range(VOCABULARY)) - seen)
    assert len(unseen) > 2
    moved = {t.name: t.whole() != 0 for t in setup.tensors}
    assert not moved["model.embed_tokens.weight"][unseen].any()
    assert moved["model.embed_tokens.weight"][sorted(seen)].any()
    if changes.get("fusion") == "ties":
        # Both models' entries are trimmed in one of (1 - 0.6)^2, and the trim follows the mask.
        for name, own in moved.items():
            assert (~own).float().mean() > 0.02 or own.numel() < 100, name
    else:
        assert all(own.all() for name, own in moved.items() if "embed" not in name)


@pytest.mark.parametrize(
    ("further", "is_equal"),
    [({}, True), ({"micro_batch": 1}, False), ({"utility_dataset": "y"}, False)],
    ids=["one micro-batch", "several", "utility"],
)
def test_tied_embeddings_are_learned_alike_up_to_the_order_of_a_sum(further, is_equal):
    changes = {"max_steps": 3, "tied": True} | further
    losses, logits = trajectory(make_setup(**changes))
    other_losses, other = trajectory(make_setup(runs=streaming.StreamingEngine, **changes))
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(logits, other, strict=True)])
    if is_equal:
        assert losses == other_losses
        assert not apart.any()
    else:
        assert losses == pytest.approx(other_losses, abs=1e-4)
        assert (apart > 1e-3).float().mean() < 0.01


def test_batches_that_go_through_in_groups_give_the_same(monkeypatch):
    monkeypatch.setattr(streaming, "GROUP_TOKENS", 20)
    batches = [token_batch([(e.prompt, e.chosen)]) for e in make_utility()]
    found = {}
    for runs in (engine.ResidentEngine, streaming.StreamingEngine):
        with_engine = make_setup(runs=runs).engine
        found[runs] = list(with_engine.evaluate(iter(batches), State(Content.UNMASKED)))
    assert len(list(streaming._groups(batches))) > 2
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one[0], other[0])


def held_bytes(tensor):
    return tensor.weight.untyped_storage().nbytes()


def test_one_layer_has_weights_at_a_time(monkeypatch):
    setup = make_setup(runs=streaming.StreamingEngine, max_steps=2)
    runs = setup.engine
    layers = [set(map(id, layer.parameters())) for layer in runs._model._layers]
    most = []
    real = LayeredModel.called

    def watching(self, *arguments):
        held = [
            number
            for number, own in enumerate(layers)
            if any(held_bytes(t) for t in setup.tensors if id(t.parameter) in own)
        ]
        most.append(len(held))
        return real(self, *arguments)

    monkeypatch.setattr(LayeredModel, "called", watching)
    trajectory(setup)
    assert set(most) == {1}
    assert all(
        t.parameter.grad is None and held_bytes(t) == 0
        for t in setup.tensors
        if any(id(t.parameter) in own for own in layers)
    )


def streamed(model):
    return streaming.StreamingEngine(model, [], [], None)


def test_models_that_are_no_row_of_layers_are_refused():
    model = tiny.tiny_llama(0, VOCABULARY)
    shared = copy.deepcopy(model)
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    with pytest.raises(StreamingImpossible, match="share weights"):
        streamed(shared)
    tied = copy.deepcopy(model)
    tied.model.extra = torch.nn.ParameterList([tied.model.layers[0].mlp.up_proj.weight])
    with pytest.raises(StreamingImpossible, match="share weights with others"):
        streamed(tied)
    two = copy.deepcopy(model)
    two.model.more = copy.deepcopy(two.model.layers)
    with pytest.raises(StreamingImpossible, match="2 lists of layers"):
        streamed(two)


def test_models_that_pass_more_than_hidden_states_are_refused():
    class Gated(type(tiny.tiny_llama(0, VOCABULARY).model)):
        def forward(self, input_ids=None, **keywords):
            return super().forward(
                input_ids=input_ids, gate=self.embed_tokens.weight.sum(), **keywords
            )

    setup = make_setup()
    model = tiny.tiny_llama(0, VOCABULARY)
    model.model.__class__ = Gated
    tensors = [dataclasses.replace(t, parameter=model.get_parameter(t.name)) for t in setup.tensors]
    with pytest.raises(StreamingImpossible, match="more than hidden states"):
        streaming.StreamingEngine(model, tensors, [], None)


def test_the_engine_is_chosen_by_what_is_free(monkeypatch, family_recipe, tmp_path):
    monkeypatch.setenv("SOMF_MICRO_BATCH_SIZE", "1")
    content = family_recipe()
    planned = planned_merge(read_recipe(content), MergeOptions())
    data = checked_data(planned)
    needs = {}
    for name in ("streaming", "resident"):
        chosen = tiny.on_machine(planned, micro_batch_size=1, engine=name)
        needs[name] = forecast(chosen, data).memory
    with_moments = planned_merge(read_recipe(family_recipe(optimizer="adamw")), MergeOptions())
    chosen = tiny.on_machine(with_moments, micro_batch_size=1, engine="resident")
    expected = forecast(chosen, data)
    assert expected.memory - needs["resident"] == 2 * 4 * expected.entries
    assert 0 < needs["streaming"] < needs["resident"]
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    for name, usable in (
        ("resident", needs["resident"]),
        ("streaming", needs["resident"] - 1),
        ("streaming", needs["streaming"]),
        ("no", needs["streaming"] - 1),
    ):
        free = math.ceil(usable / 0.9)
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        out = tmp_path / f"{name}-{free}"
        learned = tiny.invoke("mergekit-somf", "learn", file, out)
        checked = tiny.invoke("mergekit-somf", "check", file)
        for result in (learned, checked):
            if name == "no":
                assert result.exit_code == 1
                assert "does not fit in memory: resident needs about" in result.output
                assert "a coarser granularity" in result.output
            else:
                assert result.exit_code == 0, result.output
                assert f"{name}: needs about" in result.output
        assert out.exists() == (name != "no")


def test_weights_count_by_the_type_that_they_are_merged_in(family, family_recipe, tmp_path):
    for name in ("base", "math", "code"):
        shutil.copytree(family / name, tmp_path / name)
        halves = {k: t.bfloat16() for k, t in tiny.tensors_of(family / name).items()}
        save_file(halves, tmp_path / name / "model.safetensors", metadata={"format": "pt"})

    def memory(folder, **dtype):
        text = json.dumps({**family_recipe(), "dtype": None, **dtype})
        content = json.loads(text.replace(str(family), str(folder)))
        planned = planned_merge(read_recipe(content), MergeOptions())
        return forecast(planned, SafetyData([], [], "", "", [])).memory

    assert memory(tmp_path) == memory(family, dtype="bfloat16") < memory(family)
    assert memory(family) == memory(tmp_path, dtype="float32")


def test_on_a_gpu_the_engine_is_chosen_by_both_memories(monkeypatch, family_recipe):
    planned = planned_merge(read_recipe(family_recipe()), MergeOptions())
    data = checked_data(planned)
    gpu = {"device": "cuda", "micro_batch_size": 1, "precision": "bfloat16"}
    planned = tiny.on_machine(planned, **gpu)
    free = {"cuda": 1 << 40, "cpu": 1 << 40}
    monkeypatch.setattr(machine, "free_memory", lambda device: free[device])
    needs = {}
    for name in ("resident", "streaming"):
        needs[name] = forecast(tiny.on_machine(planned, engine=name, **gpu), data)
    assert needs["streaming"].memory < needs["resident"].memory
    assert (needs["resident"].host, needs["streaming"].disk) == (0, 0)
    assert forecast(planned, data).engine == "resident"
    free["cuda"] = needs["resident"].memory
    chosen = forecast(planned, data)
    assert chosen.engine == "streaming"
    # A base and a task vector of two bytes or more, and a logit of four, for each entry.
    assert chosen.host >= 8 * chosen.entries
    assert chosen.line.endswith(" GiB beside the GPU")
    free["cpu"] = chosen.host
    with pytest.raises(
        RecipeError, match=r"and 0\.0 GiB beside the GPU, .* are free, 0\.0 GiB beside"
    ):
        forecast(planned, data)


class FakeCuda:
    """What pins memory, and lets it go again."""

    def __init__(self, failing=0):
        self.failing, self.pinned = failing, {}

    def cudaHostRegister(self, address, size, flags):
        if not self.failing:
            self.pinned[address] = size
        return self.failing

    def cudaHostUnregister(self, address):
        del self.pinned[address]


def test_pinned_tensors_take_pages_of_their_own_until_they_are_given_back(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    values = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    with PinnedMemory(torch.device("cuda")) as memory:
        stored = memory.copy(values)
        assert torch.equal(stored, values)
        room = memory.empty((5, 7), torch.float32)
        assert not room.any()
        assert memory.empty((0, 3), torch.float32).shape == (0, 3)
        assert cuda.pinned == {stored.data_ptr(): 24, room.data_ptr(): 140}
        assert all(address % resource.getpagesize() == 0 for address in cuda.pinned)
    assert cuda.pinned == {}


def test_memory_beside_another_kind_of_device_is_not_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", None)
    with PinnedMemory(torch.device("xpu")) as memory:
        values = torch.arange(12.0).view(3, 4)
        assert torch.equal(memory.copy(values), values)


def test_memory_that_can_not_be_pinned_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCuda(failing=2))
    with pytest.raises(RecipeError, match=r"could not pin 16 bytes .*CUDA error 2.*ulimit -l"):
        PinnedMemory(torch.device("cuda")).empty((4,), torch.float32)


def test_the_store_is_chosen_by_device(monkeypatch, tmp_path):
    assert isinstance(training.weight_store("cpu", str(tmp_path / "a/m")), MappedFiles)
    assert isinstance(training.weight_store("cuda:1", str(tmp_path / "b/m")), PinnedMemory)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_streaming_leaves_nothing_beside_the_mask(family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    result = tiny.invoke("mergekit-somf", "learn", "--engine", "streaming", file, tmp_path / "a/m")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m"]


@pytest.mark.parametrize("has_call", [True, False], ids=["Linux", "macOS"])
def test_mapped_tensors_keep_what_is_written_and_refuse_a_full_disk(
    has_call, tmp_path, monkeypatch
):
    files = MappedFiles(str(tmp_path))
    values = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    stored = files.copy(values)
    assert torch.equal(stored, values)
    stored.mul_(2)
    assert torch.equal(stored, values * 2)
    assert files.empty((0, 3), torch.float32).shape == (0, 3)
    assert list(tmp_path.iterdir()) == []
    if not has_call:
        monkeypatch.delattr(os, "posix_fallocate")
    assert files.empty((3 << 20,), torch.float32).sum() == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RecipeError, match="no room for its files"):
            files.empty((1 << 20,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
