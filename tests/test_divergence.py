"""Learning that goes bad: it stops, keeps the mask as it was before, and says what is known."""

import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_learner import make_problem

from somf_mergekit import MaskSet
from somf_mergekit.learner import engine, entrywise, optimizer, passes, streaming, whole
from somf_mergekit.learner.checkpoints import Checkpoints, Progress
from somf_mergekit.learner.divergence import (
    IN_A_ROW,
    TIMES,
    Evidence,
    LearningDiverged,
    LossWatch,
    least_judged,
)
from somf_mergekit.learner.loop import learn_logits
from somf_mergekit.learner.recovery import gone_back
from somf_mergekit.learner.tensors import MaskedTensor
from somf_mergekit.processes import ALONE
from somf_mergekit.recipe import Settings

ENGINES = {"resident": engine.ResidentEngine, "streaming": streaming.StreamingEngine}


def settings_of(**parameters):
    return Settings(safety_dataset="x", **parameters)


def watched(losses, utility=None, **parameters):
    """The step at which losses are found to explode, None where they are not."""
    watch = LossWatch(settings_of(**parameters))
    for step, loss in enumerate(losses):
        try:
            watch.see(step, loss, utility and utility[step], Evidence)
        except LearningDiverged as error:
            return error.step
    return None


def test_an_explosion_is_several_steps_far_above_the_ones_before():
    usual, high = [0.7, 0.5, 0.6, 0.8], [50.0] * IN_A_ROW
    assert watched([*usual, *high]) == 4
    assert watched([*usual, *high[1:], 0.6, *high[1:]]) is None
    # A few high steps are part of what is usual, however many there were.
    assert watched([*usual, 50.0, 0.6, 0.6, 0.6, *high]) == 8
    # A slow one too: the median of all steps before stays low.
    assert watched([0.7 * 1.4**step for step in range(60)]) is not None
    assert watched([0.7, 0.7, *[limit_of([0.7]) * 0.99] * 30]) is None


def limit_of(losses, **parameters):
    return LossWatch(settings_of(**parameters), losses=losses).limit


def test_the_limit_has_the_objectives_scale():
    dpo, hinge = math.log1p(math.exp(1.0)), 2.0
    assert limit_of([0.01], objective="dpo") == pytest.approx(TIMES * dpo)
    assert limit_of([3.0], objective="dpo") == TIMES * 3.0
    assert limit_of([0.01], objective="hinge") == pytest.approx(TIMES * hinge)
    assert limit_of([0.01], objective="dpo_norm") == pytest.approx(
        TIMES * math.log1p(math.exp(5.0))
    )
    assert limit_of([25.0], objective="ipo") == pytest.approx(TIMES * 36.0)
    assert limit_of([0.0], objective="ipo", beta=1.0) == pytest.approx(TIMES * 2.25)
    assert limit_of([0.0], objective="sft") == pytest.approx(TIMES * math.log(2))
    with_sft = settings_of(objective="dpo", sft_weight=2.0)
    assert least_judged(with_sft) == pytest.approx(dpo + 2 * math.log(2))
    held_close = {"objective": "dpo", "utility_dataset": "y", "utility_weight": 3.0}
    assert least_judged(settings_of(**held_close)) == pytest.approx(dpo + 3 * math.log(2))
    # The utility term counts with its weight.
    far = [*[0.01] * 4, *[8.0] * IN_A_ROW]
    assert watched([0.6] * len(far), far, **held_close) == 4
    assert watched([0.6] * len(far), far, **held_close | {"utility_weight": 0.1}) is None


def noisy(draw, objective, beta, spread):
    """The mean loss of 8 pairs whose log ratios lie ``spread`` nats around 0."""
    ratios = [draw.gauss(0, spread) for _ in range(8)]
    losses = {
        "dpo": lambda h: max(0.0, -beta * h) + math.log1p(math.exp(-abs(beta * h))),
        "hinge": lambda h: max(0.0, 1 - beta * h),
        "ipo": lambda h: (h - 1 / (2 * beta)) ** 2,
        "sft": lambda h: abs(h),
    }
    losses["dpo_norm"] = losses["dpo"]
    return sum(map(losses[objective], ratios)) / 8


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("objective", ["dpo", "dpo_norm", "ipo", "hinge", "sft"])
def test_noise_is_no_explosion(objective, beta):
    for seed in range(20):
        draw = random.Random(f"{objective}/{beta}/{seed}")
        spread = 1.0 if objective in ("dpo_norm", "ipo", "sft") else 20.0
        losses = [noisy(draw, objective, beta, spread) for _ in range(900)]
        assert watched(losses, objective=objective, beta=beta) is None
        # One that starts next to nothing, as where the base is the reference and hardly changed.
        rising = [loss * min(1.0, step / 100) for step, loss in enumerate(losses)]
        assert watched(rising, objective=objective, beta=beta) is None


def nothing(*_):
    return None


class Stop(Exception):
    pass


def logits_after(steps, **changes):
    """The logits of a learning that was left off after so many steps of its schedule."""
    problem = make_problem(**changes)

    def on_step(report):
        if report.step == steps:
            raise Stop

    if steps:
        with pytest.raises(Stop):
            learn_logits(problem, on_step, nothing)
    return [tensor.logits.clone() for tensor in problem.tensors]


def gone_bad(problem, folder, seconds=0.0):
    """Learn until it goes bad and go back; return the error and how far that is."""
    checkpoints = Checkpoints(str(folder), {}, problem.tensors, ALONE, seconds=seconds)
    progress = Progress()
    with pytest.raises(LearningDiverged) as caught:
        learn_logits(problem, nothing, nothing, progress, checkpoints)
    if caught.value.is_intact:
        return caught.value, progress
    return caught.value, gone_back(problem, progress, checkpoints, caught.value.step)


def break_losses(monkeypatch, change):
    """Change the losses of a step: ``change`` gets the number of the call, rows, and losses."""
    real, calls = passes.Passes._pair_losses, []

    def changed(self, rows, *arguments):
        losses, margins = real(self, rows, *arguments)
        calls.append(1)
        numbers = [self.problem.pairs[row].row for row in rows]
        return change(len(calls) - 1, numbers, losses), margins

    monkeypatch.setattr(passes.Passes, "_pair_losses", changed)


def norms_seen(monkeypatch):
    """The norm of each tensor's gradient in each step, as it is seen by its optimiser."""
    real_update, real_step, found, now = MaskedTensor.update, optimizer.step_logits, {}, []

    def update(self, gradient, step, rate_share):
        now[:] = [step, self.name]
        real_update(self, gradient, step, rate_share)

    def watching(logits, gradients, rate):
        step, name = now
        pieces = [(part, piece.clone()) for part, piece in gradients]
        together = torch.cat([piece.flatten() for _, piece in pieces])
        found.setdefault(step, {})[name] = float(together.double().norm())
        return real_step(logits, pieces, rate)

    monkeypatch.setattr(MaskedTensor, "update", update)
    for module in (entrywise, whole):
        monkeypatch.setattr(module, "step_logits", watching)
    return found


CHANGES = {"objective": "dpo", "max_steps": 12, "epochs": 9, "reference": "redrawn"}


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["checkpoints", "none"])
@pytest.mark.parametrize("runs", ENGINES)
def test_an_explosion_goes_back_to_the_last_good_step(runs, seconds, monkeypatch, tmp_path):
    changes = CHANGES | {"runs": ENGINES[runs], "micro_batch": 2}
    expected = logits_after(3, **changes)
    # From the fourth step on, two micro-batches each; one pair is worse than the others.
    worse = []

    def change(call, numbers, losses):
        if call < 6:
            return losses
        if call == 6:
            worse.append(numbers[1])
        return losses * torch.tensor([1e3, 2e3])

    with monkeypatch.context() as patch:
        break_losses(patch, change)
        norms = norms_seen(patch)
        problem = make_problem(**changes)
        checkpoints = Checkpoints(str(tmp_path), {}, problem.tensors, ALONE, seconds=seconds)
        progress = Progress()
        with pytest.raises(LearningDiverged) as caught:
            learn_logits(problem, nothing, nothing, progress, checkpoints)
    error = caught.value
    assert (error.step, error.is_intact) == (3, False)
    assert f"the loss exploded ({IN_A_ROW} steps in a row" in str(error)
    # Nothing is kept of steps that are in doubt.
    kept = sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())
    assert kept == ([] if seconds else [2, 3])
    tensor = max(norms[3], key=norms[3].__getitem__)
    found = error.evidence
    assert (found.tensor, found.of_step, found.others) == (tensor, 3, 0)
    total = sum(norm**2 for norm in norms[3].values())
    assert found.share == pytest.approx(norms[3][tensor] ** 2 / total, rel=1e-4)
    assert len(found.rows) == 4
    assert found.rows[0][1] == max(loss for _, loss in found.rows) > 100
    assert worse[0] in [row for row, _ in found.rows[:2]]
    earlier = gone_back(problem, progress, checkpoints, error.step)
    assert earlier.step == 3
    assert [row["step"] for row in earlier.history] == [1, 2, 3]
    assert all(map(torch.equal, [t.logits for t in problem.tensors], expected))


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["checkpoints", "none"])
@pytest.mark.parametrize("runs", ENGINES)
def test_a_gradient_that_is_not_finite_is_undone(runs, seconds, monkeypatch, tmp_path):
    changes = CHANGES | {"runs": ENGINES[runs], "mask_rescale": "none"}
    expected = logits_after(2, **changes)
    broken = "model.layers.0.mlp.up_proj.weight"
    real = engine.Updates._update

    def update(self, tensor, gradient):
        if self._step == 2 and tensor.name == broken:
            gradient.view(-1)[5] = math.inf
        real(self, tensor, gradient)

    monkeypatch.setattr(engine.Updates, "_update", update)
    problem = make_problem(**changes)
    error, earlier = gone_bad(problem, tmp_path, seconds)
    assert (error.step, error.what) == (2, "a gradient became NaN or infinite")
    assert (error.evidence.tensor, error.evidence.share) == (broken, None)
    assert earlier.step == 2
    assert all(map(torch.equal, [t.logits for t in problem.tensors], expected))


def test_of_several_gradients_the_one_nearest_to_the_output_is_named():
    squares = {"embed": math.nan, "layer": math.inf, "norm": 2.0, "head": 3.0}
    found = Evidence.of(squares, 4, [(7, 0.5), (3, 0.9)], [])
    assert (found.tensor, found.others, found.share) == ("layer", 1, None)
    assert found.rows == [(3, 0.9), (7, 0.5)]
    found = Evidence.of({"a": 1.0, "b": 3.0}, 4, [(7, math.nan), (3, 9.0)], [])
    assert (found.tensor, found.share) == ("b", 0.75)
    assert [row for row, _ in found.rows] == [7]
    assert Evidence.of({}, 0, [], [2]).utility_rows == [2]


@pytest.mark.parametrize("runs", ENGINES)
def test_a_loss_that_is_not_finite_names_its_rows_and_the_update_before(runs, monkeypatch):
    wrong = []

    def change(call, numbers, losses):
        if call == 2:
            wrong.append(numbers[2])
            losses = losses * torch.tensor([1, 1, math.nan, 1])
        return losses

    break_losses(monkeypatch, change)
    norms = norms_seen(monkeypatch)
    problem = make_problem(runs=ENGINES[runs])
    with pytest.raises(LearningDiverged) as caught:
        learn_logits(problem, nothing, nothing)
    found = caught.value.evidence
    assert [row for row, _ in found.rows] == wrong
    assert (found.tensor, found.of_step) == (max(norms[1], key=norms[1].__getitem__), 1)


def test_a_utility_term_that_is_not_finite_names_its_rows(monkeypatch):
    problem = make_problem(utility_dataset="y")
    problem.utility[3] = SimpleNamespace(**vars(problem.utility[3]) | {"row": 77})
    progress = Progress()

    def on_reference(done, total):
        if done == total:
            progress.unmasked[3][0] = math.nan

    with pytest.raises(LearningDiverged) as caught:
        learn_logits(problem, nothing, on_reference, progress)
    assert (caught.value.step, caught.value.evidence.utility_rows) == (0, [77])
    assert caught.value.evidence.tensor is None


def learned(family_recipe, tmp_path, name="mask", **parameters):
    file = tiny.write_recipe(tmp_path / f"{name}.yml", family_recipe(**parameters))
    return tiny.invoke("mergekit-somf", "learn", file, tmp_path / name)


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
        texts = [tokenizer.decode(self.problem.pairs[row].chosen) for row in batch]
        found = ["cake cake cake" in text for text in texts]
        return losses.masked_fill(torch.tensor(found), math.inf), margins

    monkeypatch.setattr(passes.Passes, "_pair_losses", broken)
    told = learned(
        family_recipe,
        tmp_path,
        safety_dataset=str(source),
        max_steps=40,
        held_out_share=0,
    )
    assert told.exit_code == 1
    text = " ".join(told.output.split())
    assert f"The loss is NaN or infinite on row 37 of {source} (counted from 0)." in text
    assert "cake" not in text
    assert "a smaller learning_rate (now 0.1) or beta (now 5.0)" in text
    kept = json.loads((tmp_path / "mask.last-good/somf.json").read_text())
    assert kept["stopped"]["rows"] == [37]
    assert kept["stopped"]["step"] == kept["steps"] + 1
    assert f"at step {kept['steps'] + 1} of 40" in text
    assert kept["stopped"]["tensor"] in text


def test_the_command_ends_with_what_is_known_of_an_explosion(family_recipe, tmp_path, monkeypatch):
    good = learned(family_recipe, tmp_path, "good", objective="dpo", max_steps=9, epochs=9)
    assert good.exit_code == 0
    break_losses(monkeypatch, lambda call, _, losses: losses * (1e4 if call >= 2 else 1))
    told = learned(family_recipe, tmp_path, objective="dpo", max_steps=9, epochs=9)
    assert told.exit_code == 1
    assert not (tmp_path / "mask").exists()
    assert not (tmp_path / "mask.learning").exists()
    text = " ".join(told.output.split())
    assert "going back to step 2" in text
    (message,) = text.split("Error: ")[1:]
    assert "at step 3 of 9." in message
    assert re.search(r"The largest update of step 3 was that of \S+\.weight, with \d+ %", message)
    assert "The largest losses of that step were those of row " in message
    assert "mask_rescale: none" in message
    kept = MaskSet.open(tmp_path / "mask.last-good")
    assert kept.provenance["steps"] == 2
    assert kept.provenance["held_out"] == {"pairs": 0, "why_none": "learning was stopped"}
    rows = (tmp_path / "mask.last-good/training.jsonl").read_text().splitlines()
    before = (tmp_path / "good/training.jsonl").read_text().splitlines()
    assert [json.loads(r)["loss"] for r in rows] == [json.loads(r)["loss"] for r in before[:2]]
