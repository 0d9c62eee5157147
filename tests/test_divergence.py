"""A loss or a gradient that isn't finite: learning stops, stores the last good mask, says why."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from setups import make_setup

from somf_mergekit import MaskSet
from somf_mergekit.learner import engine, passes, streaming
from somf_mergekit.learner.checkpoint_file import Progress
from somf_mergekit.learner.loop import learn_logits
from somf_mergekit.learner.stopping import LearningDiverged
from somf_mergekit.learner.tensors import MaskedTensor

ENGINES = {"resident": engine.ResidentEngine, "streaming": streaming.StreamingEngine}


def nothing(*_):
    return None


@pytest.mark.parametrize("runs", ENGINES)
def test_a_loss_that_is_not_finite_names_its_rows(runs, monkeypatch):
    real, calls, wrong = passes.Passes._pair_losses, [], []

    def changed(self, rows, *arguments):
        losses, margins = real(self, rows, *arguments)
        calls.append(1)
        if len(calls) == 3:
            wrong.append(self.setup.pairs[rows[2]].row)
            losses = losses * torch.tensor([1, 1, math.nan, 1])
        return losses, margins

    monkeypatch.setattr(passes.Passes, "_pair_losses", changed)
    setup = make_setup(runs=ENGINES[runs])
    with pytest.raises(LearningDiverged) as caught:
        learn_logits(setup, nothing, nothing)
    found = caught.value
    assert (found.step, found.rows, found.is_intact) == (2, wrong, True)


def test_a_utility_term_that_is_not_finite_names_its_rows():
    setup = make_setup(utility_dataset="y")
    setup.utility[3] = SimpleNamespace(**vars(setup.utility[3]) | {"row": 77})
    progress = Progress()

    def on_reference(done, total):
        if done == total:
            progress.unmasked[3][0] = math.nan

    with pytest.raises(LearningDiverged) as caught:
        learn_logits(setup, nothing, on_reference, progress)
    found = caught.value
    assert (found.step, found.rows, found.utility_rows) == (0, [], [77])


def learned(family_recipe, tmp_path, name, *options, **parameters):
    file = tiny.write_recipe(tmp_path / f"{name}.yml", family_recipe(**parameters))
    return tiny.invoke("mergekit-somf", "learn", *options, file, tmp_path / name)


def test_the_row_that_is_named_is_that_of_the_file(family_recipe, tmp_path, monkeypatch):
    # Rows are left out, drawn and put in order by length: 37 is where the odd one stands.
    rows = tiny.preference_rows(60)
    rows[37]["chosen"] = "sorry cake cake cake"
    for dropped in (0, 5, 36):
        rows[dropped]["chosen"] = ""
    source = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    tokenizer = tiny.tiny_tokenizer()
    real = passes.Passes._pair_losses

    def broken(self, batch, *arguments):
        losses, margins = real(self, batch, *arguments)
        texts = [tokenizer.decode(self.setup.pairs[row].chosen) for row in batch]
        found = ["cake cake cake" in text for text in texts]
        return losses.masked_fill(torch.tensor(found), math.inf), margins

    monkeypatch.setattr(passes.Passes, "_pair_losses", broken)
    settings = {"safety_dataset": str(source), "max_steps": 40, "held_out_share": 0}
    reported = learned(family_recipe, tmp_path, "mask", **settings)
    assert reported.exit_code == 1
    text = " ".join(reported.output.split())
    assert f"the loss on row 37 of {source} (counted from 0)" in text
    assert "cake" not in text
    assert "look at these rows" in text
    stored = json.loads((tmp_path / "mask.last-good/somf.json").read_text())
    assert stored["stopped"]["rows"] == [37]
    assert stored["stopped"]["step"] == stored["steps"] + 1
    assert f"NaN or infinite at step {stored['steps'] + 1} of 40" in text


BROKEN = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("runs", "minutes"), [("resident", 0), ("streaming", 0), ("resident", 60)], ids=str
)
def test_a_gradient_that_is_not_finite_goes_back_to_the_last_checkpoint(
    runs, minutes, family_recipe, tmp_path, monkeypatch
):
    settings = {"max_steps": 5, "mask_rescale": "none"}
    real, update = engine.Updates._update, MaskedTensor.update

    def broken(self, tensor, gradient):
        if self._step == 2 and tensor.name == BROKEN:
            gradient.view(-1)[5] = math.inf
        real(self, tensor, gradient)

    options = ("--engine", runs, "--checkpoint-minutes", minutes)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Updates, "_update", broken)
        reported = learned(family_recipe, tmp_path, "mask", *options, **settings)
    assert (reported.exit_code, (tmp_path / "mask").exists()) == (1, False)
    text = " ".join(reported.output.split())
    assert f"a gradient became NaN or infinite at step 3 of 5, that of {BROKEN}" in text
    good = tmp_path / "mask.last-good"
    if minutes:
        assert "is stored in" not in text
        assert not good.exists()
        return
    assert f"The last good mask is stored in {good}" in text
    stored = MaskSet.open(good)
    assert (stored.provenance["steps"], stored.provenance["stopped"]["tensors"]) == (2, [BROKEN])
    # It is that of a training run of the same schedule whose later steps changed nothing.
    monkeypatch.setattr(
        MaskedTensor, "update", lambda *args: (args[2] < 2 and update(*args)) or None
    )
    assert learned(family_recipe, tmp_path, "expected", **settings).exit_code == 0
    expected = MaskSet.open(tmp_path / "expected")
    for name in stored.names():
        assert torch.equal(stored.entries(name), expected.entries(name)), name
    # Without the fault the same command goes on from the checkpoint.
    monkeypatch.setattr(MaskedTensor, "update", update)
    again = learned(family_recipe, tmp_path, "mask", *options, **settings)
    assert "going on after step 2" in again.output
    assert again.exit_code == 0, again.output
