"""The streaming engine where the model is on a GPU: what it is made of comes and goes.

There is no GPU here: the device is the CPU too, but what is brought is copied all the same.
"""

import pytest
import torch
from setups import FOR_ENGINES, make_setup, trajectory
from test_streaming import FakeCuda

from somf_mergekit import learn
from somf_mergekit.learner import conveyor, streaming
from somf_mergekit.learner import learning_model as model
from somf_mergekit.learner.layered import LayeredModel
from somf_mergekit.learner.loop import learn_logits
from somf_mergekit.learner.stores import PinnedMemory
from somf_mergekit.learner.streaming import StreamingEngine
from somf_mergekit.prepass import training


class LateStream:
    """Copies what it was asked to when it must, and no earlier."""

    is_cuda = False

    def __init__(self, device, is_current=False):
        self._waiting, self._done, self._asked = [], 0, 0
        self._is_current = is_current

    def do(self, copies):
        assert not self._is_current
        self._asked += 1
        self._waiting.append(copies)

    def now(self):
        return self, self._asked

    def wait(self, event):
        if event is not None:
            stream, asked = event
            stream._catch_up(asked)

    def finish(self):
        self._catch_up(self._asked)

    def _catch_up(self, asked):
        while self._done < asked:
            for there, own in self._waiting.pop(0):
                there.copy_(own)
            self._done += 1


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(streaming, "_are_elsewhere", lambda weights, device: True)


@pytest.mark.parametrize(
    ("name", "is_late"), [*((name, True) for name in FOR_ENGINES), ("defaults", False)]
)
def test_trajectory_is_that_of_the_engine_without(name, is_late, elsewhere, monkeypatch):
    # More layers than slots.
    changes = {"max_steps": 3, "micro_batch": 2, "layers": 4} | FOR_ENGINES[name]
    with monkeypatch.context() as without:
        without.setattr(streaming, "_are_elsewhere", lambda weights, device: False)
        expected = trajectory(make_setup(runs=StreamingEngine, **changes))
    if is_late:
        monkeypatch.setattr(conveyor, "_Stream", LateStream)
    setup = make_setup(runs=StreamingEngine, **changes)
    assert setup.engine._conveyor
    losses, logits = trajectory(setup)
    assert losses == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(logits, expected[1], strict=True))


def test_layers_are_computed_with_on_the_device_alone(elsewhere, monkeypatch):
    setup = make_setup(runs=StreamingEngine, max_steps=2, layers=4)
    engine = setup.engine
    rooms = [slot.room for slot in engine._conveyor._slots]
    seen = set()
    real = LayeredModel.called

    def watched(self, number, *arguments):
        for parts in engine._conveyor._slot_of(number).parts.values():
            for own in (parts.base, *parts.merge.deltas, *parts.learned):
                places = [own.data_ptr() - room.data_ptr() for room in rooms]
                inside = [
                    0 <= place < room.nbytes for place, room in zip(places, rooms, strict=True)
                ]
                assert sum(inside) == 1
                seen.add(inside.index(True))
        return real(self, number, *arguments)

    monkeypatch.setattr(LayeredModel, "called", watched)
    homes = [t.parts for t in setup.tensors]
    trajectory(setup)
    assert seen == {0, 1}
    assert all(t.parts is home for t, home in zip(setup.tensors, homes, strict=True))


def test_logits_set_from_outside_are_brought_anew(elsewhere):
    def learned(sets):
        setup = make_setup(runs=StreamingEngine, max_steps=1, layers=4)
        if sets:
            # As a checkpoint does, after the engine has looked at the model.
            for tensor in setup.tensors:
                tensor.set_whole(torch.full(tensor.layout.shape, 2.0))
        reports = []
        learn_logits(setup, reports.append, lambda done, total: None)
        return reports[0].loss, [t.whole() for t in setup.tensors]

    first, second = learned(False), learned(True)
    assert first[0] != second[0]
    assert all((logits > 1.0).all() for logits in second[1])


def test_a_layer_comes_while_the_one_before_is_computed_with(elsewhere, monkeypatch):
    asked = []
    real = conveyor._Slot.fill
    setup = make_setup(runs=StreamingEngine, max_steps=1, layers=4)
    engine = setup.engine

    def noted(self, number, layer):
        asked.append(("comes", number))
        return real(self, number, layer)

    monkeypatch.setattr(conveyor._Slot, "fill", noted)
    called = LayeredModel.called

    def computed(self, number, *arguments):
        asked.append(("computed", number))
        return called(self, number, *arguments)

    monkeypatch.setattr(LayeredModel, "called", computed)
    engine._conveyor.forget()
    learn_logits(setup, lambda report: None, lambda done, total: None)
    last = len(engine._model) - 1
    for number in range(1, last + 1):
        assert asked.index(("comes", number)) < asked.index(("computed", number - 1))
    # Forward every layer comes once, and on the way back the last two are still there.
    forward = [("comes", number) for number in range(last + 1)]
    back = [("comes", number) for number in reversed(range(last - 1))]
    comings = [event for event in asked if event[0] == "comes"]
    assert comings[-len(forward + back) :] == forward + back


def test_a_mask_learned_from_pinned_memory_is_the_same(
    elsewhere, family_recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_ENGINE", "streaming")
    recipe = family_recipe(max_steps=2)
    learn(recipe, tmp_path / "plain")
    cuda, moved = FakeCuda(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(
        training, "weight_store", lambda device, folder: PinnedMemory(torch.device("cuda"))
    )
    real = model.unfilled_model

    def watched(*arguments, **keywords):
        whole = real(*arguments, **keywords)
        moved.append(sum(weight.untyped_storage().nbytes() for weight in whole.parameters()))
        assert len(cuda.pinned) > len(list(whole.parameters()))
        return whole

    monkeypatch.setattr(model, "unfilled_model", watched)
    learn(recipe, tmp_path / "pinned")
    # No weight had memory on the device before it was needed, and none is pinned any more.
    assert moved == [0]
    assert cuda.pinned == {}
    masks = [tmp_path / name / "masks.safetensors" for name in ("plain", "pinned")]
    assert masks[0].read_bytes() == masks[1].read_bytes()
