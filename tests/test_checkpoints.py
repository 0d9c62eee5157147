"""Learning that was stopped goes on where it was, and ends as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock
from safetensors import safe_open
from test_learner import make_problem

from somf_mergekit import RecipeError, learn
from somf_mergekit.learner import checkpoints as module
from somf_mergekit.learner.checkpoints import Checkpoints, Progress
from somf_mergekit.learner.engine import ResidentEngine
from somf_mergekit.learner.interruption import LearningInterrupted
from somf_mergekit.learner.loop import learn_logits
from somf_mergekit.learner.safetensors_file import StoredTensor, write_safetensors
from somf_mergekit.processes import ALONE

FINGERPRINT = {"models": ["a", "b"]}
SETTINGS = {
    "max_steps": 6,
    "epochs": 2,
    "reference": "base",
    "utility_dataset": "u",
    "utility_weight": 0.5,
}


def kept(problem, folder, seconds=0.0, fingerprint=FINGERPRINT):
    return Checkpoints(str(folder), fingerprint, problem.tensors, ALONE, seconds=seconds)


def nothing(*_):
    return None


def trajectory(problem, progress=None, checkpoints=None, until=None):
    """Learn, at most until a step, and return losses and logits."""
    losses = []

    def on_step(report):
        losses.append(report.loss)
        if checkpoints and report.step == until:
            checkpoints.stop.signal = signal.SIGTERM

    if until:
        with pytest.raises(LearningInterrupted):
            learn_logits(problem, on_step, nothing, progress, checkpoints)
    else:
        learn_logits(problem, on_step, nothing, progress, checkpoints)
    return losses, [tensor.logits.clone() for tensor in problem.tensors]


@pytest.mark.parametrize(
    "settings", [SETTINGS, {"max_steps": 6, "epochs": 2, "reference": "redrawn"}], ids=str
)
def test_a_learning_that_was_stopped_ends_as_one_that_was_not(settings, tmp_path):
    losses, logits = trajectory(make_problem(**settings))
    first = make_problem(**settings)
    before, _ = trajectory(first, Progress(), kept(first, tmp_path, seconds=1e9), until=2)
    second = make_problem(**settings)
    checkpoints = kept(second, tmp_path)
    progress = checkpoints.latest()
    assert (progress.step, [row["loss"] for row in progress.history]) == (2, before)
    after, ends = trajectory(second, progress, checkpoints)
    assert before + after == losses
    assert all(map(torch.equal, ends, logits))
    assert [row["step"] for row in progress.history] == [1, 2, 3, 4, 5, 6]
    # Two generations, until the end.
    names = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir())
    assert names == ["step-5", "step-6"]
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_mask_learned_once_more_is_the_same_byte_for_byte_with_its_record(
    family_recipe, tmp_path
):
    recipe = family_recipe(max_steps=2)
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        learn(recipe, folder)
    for name in ("masks.safetensors", "somf.json"):
        first, second = (folder.joinpath(name).read_bytes() for folder in folders)
        assert first == second, name
    histories = [(folder / "training.jsonl").read_text() for folder in folders]
    # Two steps never take the same time.
    assert histories[0] != histories[1]


def test_what_was_compared_with_is_not_computed_again(tmp_path, monkeypatch):
    first = make_problem(**SETTINGS)
    trajectory(first, Progress(), kept(first, tmp_path), until=1)
    second = make_problem(**SETTINGS)
    monkeypatch.setattr(type(second.engine), "evaluate", None)
    trajectory(second, kept(second, tmp_path).latest(), kept(second, tmp_path))


def test_a_checkpoint_that_does_not_count_is_passed_over(tmp_path):
    first = make_problem(**SETTINGS)
    trajectory(first, Progress(), kept(first, tmp_path), until=3)
    other = make_problem(**SETTINGS)
    assert kept(other, tmp_path, fingerprint={"models": ["a", "c"]}).latest().step == 0
    newest, older = sorted(tmp_path.iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert kept(other, tmp_path).latest().step == 2
    older.write_bytes(b"\xff" * 100)
    assert kept(other, tmp_path).latest().step == 0
    assert all(bool((t.logits == t.init_logit).all()) for t in other.tensors)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    problem = make_problem(**SETTINGS)
    real, calls = module.write_safetensors, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(RecipeError, match=r"No space left.*The last one\s+is as it was"):
        trajectory(problem, Progress(), kept(problem, tmp_path))
    assert kept(make_problem(**SETTINGS), tmp_path).latest().step == 2


def test_a_file_that_fails_half_way_is_not_there(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.arange(6.0).view(2, 3)
    write_safetensors(str(path), [StoredTensor.of("a", values)], {"k": "v"})
    before = path.read_bytes()

    def fails():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write_safetensors(str(path), [StoredTensor("a", (2, 3), torch.float32, fails)], {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"k": "v"}
        assert torch.equal(file.get_tensor("a"), values)


def test_a_second_learning_into_the_same_folder_is_refused(family_recipe, tmp_path):
    place = tmp_path / "mask.learning"
    place.mkdir()
    lock = FileLock(place / "lock")
    with lock, pytest.raises(RecipeError, match="another process is learning into"):
        learn(family_recipe(), tmp_path / "mask")
    # One that is left by a process that was killed holds nothing.
    (place / "step-3-ffffffffffff.safetensors.partial").write_bytes(b"half")
    learn(family_recipe(), tmp_path / "mask")
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def many_steps(family_recipe):
    return family_recipe(max_steps=40, batch_size=2, epochs=9)


def started(file, folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "somf_mergekit", "learn", str(file), str(folder)],
        env={**os.environ, "SOMF_CHECKPOINT_MINUTES": "0", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def steps_kept(folder: Path):
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(n.split("-")[1]) for n in names if n.endswith(".safetensors")), default=0)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_after_a_step_and_the_same_command_goes_on(
    number, code, family_recipe, tmp_path
):
    file = tiny.write_recipe(tmp_path / "recipe.yml", many_steps(family_recipe))
    place = tmp_path / "mask.learning"
    process = started(file, tmp_path / "mask", SOMF_CHECKPOINT_MINUTES="60")
    wait_for(lambda: (place / "lock").exists(), process)
    wait_for(lambda: ignores(process, number), process)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert "give the same command again to go on" in told
    assert "Traceback" not in told
    assert not (tmp_path / "mask").exists()
    assert steps_kept(place) < 40


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_memory_runs_out_the_same_command_goes_on(
    error, family_recipe, tmp_path, monkeypatch
):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe(max_steps=3))
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    real = ResidentEngine.learn

    def failing(self, parts, step, rate_share):
        if step == 2:
            raise error
        real(self, parts, step, rate_share)

    with monkeypatch.context() as without_memory:
        without_memory.setattr(ResidentEngine, "learn", failing)
        stopped = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert stopped.exit_code == 1
    assert isinstance(stopped.exception, SystemExit)
    reason = str(error) or "MemoryError"
    assert f"the memory was not enough for step 3 ({reason})" in stopped.output
    command = ["learn", "--micro-batch-size", "1", file, tmp_path / "mask"]
    ended = tiny.invoke("mergekit-somf", *command)
    assert ended.exit_code == 0, ended.output
    assert "somf: going on after step 2" in ended.output


def test_other_errors_are_not_taken_for_a_lack_of_memory(family_recipe, tmp_path, monkeypatch):
    def failing(self, parts, step, rate_share):
        raise RuntimeError("a fault")

    monkeypatch.setattr(ResidentEngine, "learn", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        learn(family_recipe(max_steps=1), tmp_path / "mask")


def ignores(process, number):
    """Whether a process has a handler of its own for a signal."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            caught = int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1
            return bool(caught)
    return False


def test_a_process_that_is_killed_at_any_moment_can_be_gone_on_with(family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", many_steps(family_recipe))
    whole = started(file, tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    mask, place = tmp_path / "mask", tmp_path / "mask.learning"
    draw = random.Random(0)
    for kill in (3, 17):
        process = started(file, mask)
        wait_for(lambda kill=kill: steps_kept(place) >= kill, process)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert steps_kept(place) >= kill
    last = started(file, mask)
    assert last.wait(timeout=300) == 0
    assert "going on after step" in last.stderr.read()
    assert not place.exists()
    # The times of the steps differ, and with them their checksum.
    name = "masks.safetensors"
    assert (mask / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(row) for row in (mask / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
