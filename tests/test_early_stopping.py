"""Learning that stops when it is done: the looks, the rule, and the mask that is kept."""

import dataclasses
import json
import re
import signal

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions
from setups import make_pairs, make_setup, stopped_before
from transformers import AutoModelForCausalLM

from somf_mergekit import MaskSet, RecipeError, learn
from somf_mergekit.common.process_group import ALONE
from somf_mergekit.data.encoding import EncodedPair
from somf_mergekit.data.held_out import LEAST, held_out_halves
from somf_mergekit.data.logprobs import answer_token_log_probs, output_head, token_batch
from somf_mergekit.data.pairs import Pair
from somf_mergekit.evaluate.likelihood import preference_margins
from somf_mergekit.learner import engine, loop, streaming
from somf_mergekit.learner.checkpoint_file import Progress
from somf_mergekit.learner.checkpoints import Checkpoints
from somf_mergekit.learner.looks import Choice, choice, has_ended
from somf_mergekit.learner.stopping import LearningInterrupted
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.forecast import forecast
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.prepass.provenance import learning_fingerprint
from somf_mergekit.recipe.validate import read_recipe

FINGERPRINT = {"models": ["a"]}
# What is compared with is drawn anew for each batch: the same whichever steps follow.
SETTINGS = {"max_steps": 8, "epochs": 3, "reference": "redrawn", "granularity": "row"}
SETTINGS |= {"patience": 2, "look_every": 1, "learning_rate": 0.3}


def history_of(looks):
    """A row per step, of which every second one has a look.

    Args:
        looks: preference above the plain merge's, and error, in units of 1/64; divergence.
    """
    rows = []
    for number, (above, error, divergence) in enumerate(looks, 1):
        look = {"margin": above, "preference": None, "error": error, "divergence": divergence}
        if above is not None:
            look |= {"preference": 0.5 + above / 64, "error": error / 64}
        rows += [{"step": 2 * number - 1}, {"step": 2 * number, "look": look}]
    return rows


NUMBERS = st.integers(-8, 8)
LOOKS = st.lists(st.tuples(NUMBERS, st.integers(0, 3), st.integers(0, 4)), min_size=1)


@given(LOOKS)
def test_the_rule_is_that_of_one_standard_error(looks):
    # The plain merge first.
    shown = [(0, 0, 0), *looks]
    kept = gained = 0
    for number, (gain, _, divergence) in enumerate(shown):
        largest = max(range(number + 1), key=lambda place: shown[place][0])
        least = shown[largest][0] - shown[largest][1]
        if shown[kept][0] < least:
            assert largest == number
            kept = gained = number
        elif gain >= least and divergence < shown[kept][2]:
            kept = number
    found = choice(history_of(looks))
    assert (found.step, found.waiting) == (2 * kept, len(looks) - gained)
    for patience in (1, 2, 3):
        expected = kept > 0 and found.waiting >= patience
        assert has_ended(history_of(looks), patience) is expected
    assert not has_ended(history_of(looks), "none")


@pytest.mark.parametrize(
    ("looks", "kept", "waiting"),
    [
        ([(2, 1, 1), (4, 1, 2), (6, 1, 3)], 6, 0),
        # What is gained slowly is gained in the end.
        ([(2, 1, 1), (2.6, 1, 2), (3.2, 1, 3)], 6, 0),
        ([(3, 1, 1), (3.9, 1, 2), (3.8, 1, 3)], 2, 2),
        ([(3, 1, 5), (2.5, 1, 4), (1, 1, 3)], 4, 2),
        ([(2, 1, 1), (5, 1, 2), (1, 1, 3)], 4, 1),
        # Not above the plain merge, so that the wait has not begun.
        ([(-1, 1, 1), (0.5, 1, 2), (1, 1, 3)], 0, 3),
    ],
)
def test_an_earlier_mask_stays_as_long_as_a_later_one_is_not_clearly_better(looks, kept, waiting):
    found = choice(history_of(looks))
    assert (found.step, found.waiting) == (kept, waiting)


def test_a_look_that_is_not_finite_is_no_gain():
    none = (None, None, None)
    assert choice(history_of([none, none])).step == 0
    assert not has_ended(history_of([none, none]), 1)
    assert choice(history_of([none, (2, 1, 1), none])).step == 4
    assert has_ended(history_of([none, (2, 1, 1), none]), 1)


def setup_of(validation, **settings):
    return dataclasses.replace(make_setup(**SETTINGS | settings), validation=validation)


def stored(setup, folder, seconds=1e9):
    folder.mkdir(exist_ok=True)
    return Checkpoints(str(folder), FINGERPRINT, setup.tensors, ALONE, seconds=seconds)


def learned(setup, folder, seconds=1e9, until=None):
    """Learn, going on with what is in a folder; return the history and the logits."""
    checkpoints = stored(setup, folder, seconds)
    progress = checkpoints.latest()

    def on_step(report):
        if report.step == until:
            checkpoints.stop.signal = signal.SIGTERM

    def run():
        loop.learn_logits(setup, on_step, lambda *_: None, progress, checkpoints)

    if until:
        with pytest.raises(LearningInterrupted):
            run()
    else:
        run()
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in progress.history]
    return rows, [tensor.whole().clone() for tensor in setup.tensors]


def plain_logits(steps, **settings):
    """The logits after some steps of the same schedule, without looks."""
    settings = SETTINGS | settings | {"patience": "none", "schedule_steps": SETTINGS["max_steps"]}
    setup = make_setup(**settings | {"max_steps": steps})
    loop.learn_logits(setup, lambda report: None, lambda *_: None)
    return [tensor.whole().clone() for tensor in setup.tensors]


# Those of the first step, and others that nothing is learned of, for all answers are random: the
# first steps gain, the later ones don't.
SOME = [*make_pairs()[:4], *make_pairs(6, seed=3)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "weight"}, {"optimizer": "adamw", "learning_rate": 1.0}],
    ids=str,
)
def test_a_training_run_that_overfits_stops_and_keeps_the_earlier_mask(settings, tmp_path):
    rows, logits = learned(setup_of(SOME, **settings), tmp_path / "c")
    kept = choice(rows)
    assert kept.step < len(rows) < 8
    assert kept.waiting == 2
    assert all(map(torch.equal, logits, plain_logits(kept.step, **settings)))
    assert not all(map(torch.equal, logits, plain_logits(len(rows), **settings)))


def test_a_training_run_that_still_gains_goes_on_to_the_end(tmp_path):
    # The pairs that are learned from: before the learning rate falls, every step gains.
    setup = setup_of(make_pairs(), patience=1, max_steps=3, schedule_steps=8)
    rows, logits = learned(setup, tmp_path / "c")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert choice(rows) == Choice(step=3, waiting=0)
    assert all(map(torch.equal, logits, plain_logits(3)))


def test_looks_are_taken_every_so_many_steps_and_at_the_end(tmp_path):
    rows, _ = learned(setup_of(make_pairs(), look_every=3, patience=9), tmp_path / "c")
    assert [row["step"] for row in rows if "look" in row] == [3, 6, 8]
    setup = make_setup(**SETTINGS | {"patience": "none"})
    assert not any("look" in row for row in learned(setup, tmp_path / "d")[0])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"utility_dataset": "u"}], ids=str)
def test_every_engine_takes_the_same_mask(settings, autocast, tmp_path):
    found = []
    for runs in (engine.ResidentEngine, streaming.StreamingEngine):
        further = {"runs": runs, "micro_batch": 3, "autocast": autocast, "look_every": 2}
        setup = setup_of(SOME, **settings | further)
        found.append(learned(setup, tmp_path / runs.__name__))
    (rows, logits), (other_rows, others) = found
    looks = [[row.get("look") for row in own] for own in (rows, other_rows)]
    assert looks[0] == looks[1]
    assert choice(rows) == choice(other_rows)
    if not settings:
        assert all(map(torch.equal, logits, others))


def steps_in(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_training_run_that_was_stopped_keeps_the_same_mask(seconds, tmp_path):
    def setup():
        return setup_of(make_pairs(), patience=3, learning_rate=1.0)

    rows, logits = learned(setup(), tmp_path / "whole")
    kept = [choice(rows[:step]).step for step in range(1, len(rows) + 1)]
    assert kept == [1, 2, 3, 3, 3, 6, 6, 6]
    for until in range(1, len(rows)):
        learned(setup(), tmp_path / "again", seconds, until=until)
        found = steps_in(tmp_path / "again")
        # The mask that is kept so far stays beside the newest two.
        assert {kept[until - 1], until} <= {*found}
        assert len(found) <= 4
    # The last time, nothing is left to be learned.
    for _ in range(2):
        again, ends = learned(setup(), tmp_path / "again", seconds)
        assert again == rows
        assert all(map(torch.equal, ends, logits))


def test_what_was_kept_must_be_there_to_go_on(tmp_path, capsys):
    setup = setup_of(SOME, patience=5)
    rows, logits = learned(setup, tmp_path / "whole")
    folder, kept = tmp_path / "c", choice(rows).step
    learned(setup_of(SOME, patience=5), folder, 0, until=kept + 3)
    assert steps_in(folder) == [kept, kept + 2, kept + 3]
    (path,) = folder.glob(f"step-{kept}-*")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    checkpoints = stored(setup, folder)
    assert checkpoints.latest() == Progress()
    said = capsys.readouterr().err
    assert said.count("it is damaged (its checksum is another)") == 3
    assert f"it needs {path}" in said
    with pytest.raises(RecipeError, match=rf"the mask of step {kept}, which is the one .* damaged"):
        checkpoints.go_back(kept)
    path.unlink()
    assert checkpoints.latest() == Progress()
    assert f"it needs {path}: it is missing" in capsys.readouterr().err
    # The same in the end, from the beginning.
    again, ends = learned(setup_of(SOME, patience=5), folder)
    assert again == rows
    assert all(map(torch.equal, ends, logits))


@given(st.lists(st.integers(0, 60), max_size=100), st.randoms())
def test_halves_are_of_whole_prompts_whatever_their_order(prompts, draw):
    pairs = [Pair((("user", str(p)),), "a", "b", row) for row, p in enumerate(prompts)]
    held_out = [EncodedPair([1], [2], [row], row) for row in range(len(pairs))]
    try:
        halves = held_out_halves(held_out, pairs, "")
    except RecipeError:
        most = max(map(prompts.count, prompts), default=0)
        assert (len(pairs) - most) / 2 < LEAST
        return
    assert min(map(len, halves)) >= LEAST
    assert sorted(p.row for half in halves for p in half) == list(range(len(pairs)))
    asked = [{prompts[p.row] for p in half} for half in halves]
    assert not asked[0] & asked[1]
    shuffled = draw.sample(held_out, len(held_out))
    assert [sorted(p.row for p in half) for half in held_out_halves(shuffled, pairs, "")] == [
        [p.row for p in half] for half in halves
    ]


@pytest.fixture
def recipe(family_recipe, tmp_path):
    """A recipe with 80 pairs, of which 24 are held out."""
    source = tiny.write_jsonl(tmp_path / "many.jsonl", tiny.preference_rows(80, seed=1))

    def make(**parameters):
        values = {"safety_dataset": str(source), "held_out_share": 0.3, "granularity": "row"}
        values |= {"max_steps": 6, "patience": 1, "look_every": 2, "learning_rate": 0.4}
        return family_recipe(**values | parameters)

    return make


def data_of(content):
    planned = planned_merge(read_recipe(content), MergeOptions())
    return planned, checked_data(planned)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def prompt_log_probs(folder, pairs):
    """Log-probabilities of the tokens of each prompt, given those before."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = dict.fromkeys(tuple(pair.prompt) for pair in pairs)
    batch = token_batch([(list(p[:1]), list(p[1:])) for p in prompts])
    with torch.no_grad():
        return answer_token_log_probs(model, output_head(model), batch)[0]


@pytest.mark.parametrize("engine_name", ["resident", "streaming"])
@pytest.mark.parametrize("mask_kind", ["soft", "binary"])
def test_a_look_sees_the_merge_that_is_written(
    mask_kind, engine_name, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_PRECISION", "float32")
    monkeypatch.setenv("SOMF_ENGINE", engine_name)
    content = recipe(mask_kind=mask_kind)
    tiny.merged(content, tmp_path / "out")
    plain = {**content, "merge_method": "task_arithmetic", "parameters": {}}
    tiny.merged(plain, tmp_path / "plain")
    _, data = data_of(content)
    rows, record = (
        rows_of(tmp_path / "out/somf"),
        json.loads((tmp_path / "out/somf/somf.json").read_text()),
    )
    chosen = record["validation"]
    assert (chosen["pairs"], len(data.validation), len(data.held_out)) == (12, 12, 12)
    assert (record["held_out"]["pairs"], record["dataset"]["held_out"]) == (12, 12)
    assert (chosen["mask_step"], record["steps"]) == (choice(rows).step, len(rows))
    look = next(row["look"] for row in rows if row["step"] == chosen["mask_step"])
    found = {}
    for name in ("plain", "out"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        margins = preference_margins(model, data.validation, batch_size=8)
        found[name] = torch.tensor(margins, dtype=torch.float64)
    preferences = torch.sigmoid(5 * (found["out"] - found["plain"]))
    assert look["margin"] == pytest.approx(float(found["out"].mean()), rel=1e-3, abs=1e-4)
    assert look["preference"] == pytest.approx(float(preferences.mean()), rel=1e-3)
    error = max(float(preferences.std()) / 12**0.5, 1 / 12)
    assert look["error"] == pytest.approx(error, rel=1e-2)
    apart = [prompt_log_probs(tmp_path / name, data.validation) for name in ("out", "plain")]
    expected = float((apart[0] - apart[1]).square().mean()) / 2
    assert look["divergence"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_a_merge_says_which_mask_it_took_and_why(recipe, tmp_path):
    # A reference that is the same whichever steps follow.
    content = recipe(max_steps=20, reference="redrawn")
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 0, result.output
    chosen = MaskSet.open(tmp_path / "out/somf").provenance["validation"]
    rows = rows_of(tmp_path / "out/somf")
    steps = len(rows)
    assert chosen["mask_step"] == choice(rows).step <= steps < 20
    why = "1 look without a gain"
    assert (chosen["looks"], chosen["why_ended"]) == (steps // 2, why)
    line = f"learned in {steps} steps; the mask is that of step {chosen['mask_step']}: {why};"
    assert line in result.output
    text = (tmp_path / "out/somf/report.md").read_text()
    assert f"; the mask is that of step {chosen['mask_step']} ({why})" in text
    assert re.search(rf"\| kept +\| +{chosen['mask_step']} \|", text)
    assert re.search(rf"\| last +\| +{steps} \|", text)
    report = json.loads((tmp_path / "out/somf/report.json").read_text())
    assert report["learning"]["validation"] == chosen
    # The mask is that of a training run that ends there.
    short = {"patience": None, "look_every": None, "max_steps": chosen["mask_step"]}
    other = learn(recipe(**short, schedule_steps=20, reference="redrawn"), tmp_path / "short")
    masks = MaskSet.open(tmp_path / "out/somf")
    for name in masks.names():
        assert torch.equal(masks.probabilities(name), other.probabilities(name))


def test_a_command_that_was_stopped_and_given_again_writes_the_same_bytes(recipe, tmp_path):
    content = recipe(max_steps=20)
    learn(content, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    with stopped_before(len(rows) - 1):
        learn(content, tmp_path / "mask")
    # By default checkpoints are minutes apart: these are of masks that were kept.
    kept = steps_in(tmp_path / "mask.learning")
    assert kept[-1] == choice(rows[:-1]).step
    learn(content, tmp_path / "mask")
    for name in ("masks.safetensors", "somf.json"):
        one, other = (tmp_path / folder / name for folder in ("whole", "mask"))
        assert one.read_bytes() == other.read_bytes(), name
    assert [row.get("look") for row in rows_of(tmp_path / "mask")] == [
        row.get("look") for row in rows
    ]
    assert not (tmp_path / "mask.learning").exists()


def test_where_no_look_gains_the_mask_is_that_of_the_last_step(recipe, tmp_path):
    source = str(tiny.write_jsonl(tmp_path / "mixed.jsonl", mixed(80)))
    content = recipe(safety_dataset=source, learning_rate=0.02)
    chosen = learn(content, tmp_path / "mask").provenance["validation"]
    assert (chosen["mask_step"], chosen["looks"]) == (6, 3)
    assert chosen["why_ended"].endswith("no look was a gain over the plain merge")
    whole = learn(recipe(**{**content["parameters"], "patience": "none"}), tmp_path / "whole")
    for name in whole.names():
        expected = whole.probabilities(name)
        assert torch.equal(MaskSet.open(tmp_path / "mask").probabilities(name), expected)


def mixed(count):
    """Pairs of which half want the opposite of the other half."""
    rows = tiny.preference_rows(count, seed=1)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"held_out_share": 0.1}, "8 are held out. Use more"),
        ({"held_out_share": 0}, "0 are held out (held_out_share is 0). Use more"),
        ({"held_out_share": 0.05}, "(0.05 of 80 pairs with whole prompts is fewer than 5)"),
        ({"patience": 0}, "0 is not a whole number >= 1 or `none`"),
        ({"patience": "never"}, "'never' is not a whole number >= 1 or `none`"),
        ({"look_every": 0}, "0 is not a whole number >= 1"),
    ],
)
def test_what_can_not_be_looked_at_is_refused_early(parameters, why, recipe, tmp_path):
    message = tiny.refused(recipe(**parameters), tmp_path)
    assert "parameters.patience" in message or "parameters.look_every" in message
    assert why in message


def test_safe_answers_alone_can_not_be_looked_at(recipe, tmp_path):
    rows = [{"prompt": r["prompt"], "answer": r["chosen"]} for r in tiny.preference_rows(80)]
    source = str(tiny.write_jsonl(tmp_path / "answers.jsonl", rows))
    message = tiny.refused(recipe(safety_dataset=source, objective="sft"), tmp_path)
    assert "0 are held out (the data has no unsafe answers)" in message


def test_a_check_says_that_steps_may_be_fewer(recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe())
    said = tiny.invoke("mergekit-somf", "check", file).output
    assert re.search(r"held out: +12 pairs\n +chosen by: +12 further pairs\n", said)
    assert re.search(r"steps: +at most 6 of 4 pairs", said)


def test_room_is_asked_for_what_is_kept(recipe):
    needed = []
    for patience in ("none", 1):
        planned, data = data_of(recipe(patience=patience))
        needed.append({what: size for what, _, size in forecast(planned, data).files("m")})
    assert needed[1]["checkpoints"] == needed[0]["checkpoints"] // 3 * 5


def test_without_patience_nothing_else_is_learned_or_recorded(recipe):
    plain, others = (
        learning_fingerprint(*data_of(recipe(patience="none", look_every=every)), {})
        for every in (2, 9)
    )
    assert plain == others
    assert not {"patience", "look_every"} & {*plain["settings"]}
    looked = learning_fingerprint(*data_of(recipe()), {})
    assert looked["data"] == plain["data"]
    assert {*looked} - {*plain} == {"validation data"}
    assert {*looked["settings"]} - {*plain["settings"]} == {"patience", "look_every"}
