"""Learning that was stopped goes on where it was, and ends as if it had not been."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
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
from setups import make_setup

from somf_mergekit import RecipeError, learn
from somf_mergekit.common.process_group import ALONE, Processes
from somf_mergekit.learner import checkpoints as module
from somf_mergekit.learner.checkpoint_file import Progress, StoredTensor, write_safetensors
from somf_mergekit.learner.checkpoints import Checkpoints, learning_folder
from somf_mergekit.learner.engine import ResidentEngine
from somf_mergekit.learner.loop import learn_logits
from somf_mergekit.learner.stopping import LearningInterrupted
from somf_mergekit.prepass import mask_storing, training

FINGERPRINT = {"models": ["a", "b"]}
SETTINGS = {
    "max_steps": 6,
    "epochs": 2,
    "reference": "base",
    "utility_dataset": "u",
    "utility_weight": 0.5,
}


def stored(setup, folder, seconds=0.0, fingerprint=FINGERPRINT):
    return Checkpoints(str(folder), fingerprint, setup.tensors, ALONE, seconds=seconds)


def nothing(*_):
    return None


def trajectory(setup, progress=None, checkpoints=None, until=None):
    """Learn, at most until a step, and return losses and logits."""
    losses = []

    def on_step(report):
        losses.append(report.loss)
        if checkpoints and report.step == until:
            checkpoints.stop.signal = signal.SIGTERM

    if until:
        with pytest.raises(LearningInterrupted):
            learn_logits(setup, on_step, nothing, progress, checkpoints)
    else:
        learn_logits(setup, on_step, nothing, progress, checkpoints)
    return losses, [tensor.whole().clone() for tensor in setup.tensors]


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {"max_steps": 6, "epochs": 2, "reference": "redrawn"},
        {"max_steps": 6, "epochs": 2, "optimizer": "adamw", "granularity": "row"},
    ],
    ids=str,
)
def test_a_learning_that_was_stopped_ends_as_one_that_was_not(settings, tmp_path):
    losses, logits = trajectory(make_setup(**settings))
    first = make_setup(**settings)
    before, _ = trajectory(first, Progress(), stored(first, tmp_path, seconds=1e9), until=2)
    second = make_setup(**settings)
    checkpoints = stored(second, tmp_path)
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
    # Without a checkpoint, the optimiser starts anew as the logits do.
    assert checkpoints.latest().step == 0
    for tensor in second.tensors:
        assert all(not own.any() for own in tensor.state.values())


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
    first = make_setup(**SETTINGS)
    trajectory(first, Progress(), stored(first, tmp_path), until=1)
    second = make_setup(**SETTINGS)
    monkeypatch.setattr(type(second.engine), "evaluate", None)
    trajectory(second, stored(second, tmp_path).latest(), stored(second, tmp_path))


def test_a_checkpoint_that_does_not_count_is_passed_over(tmp_path):
    first = make_setup(**SETTINGS)
    trajectory(first, Progress(), stored(first, tmp_path), until=3)
    other = make_setup(**SETTINGS)
    assert stored(other, tmp_path, fingerprint={"models": ["a", "c"]}).latest().step == 0
    newest, older = sorted(tmp_path.iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert stored(other, tmp_path).latest().step == 2
    older.write_bytes(b"\xff" * 100)
    assert stored(other, tmp_path).latest().step == 0
    assert all(bool((t.whole() == t.init_logit).all()) for t in other.tensors)


def steps_in(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


def test_damaged_and_foreign_checkpoints_are_reported_and_go(tmp_path, capsys):
    setup = make_setup(**SETTINGS)
    trajectory(setup, Progress(), stored(setup, tmp_path), until=1)
    key = newest(tmp_path).name.split("-")[2]
    # As a bad disk leaves them, with higher numbers than what is written next.
    for name in (f"step-100-{key}", f"step-110-{key}", "step-7-0123456789ab.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    again = make_setup(**SETTINGS)
    checkpoints = stored(again, tmp_path)
    progress = checkpoints.latest()
    assert progress.step == 1
    said = capsys.readouterr().err.splitlines()
    assert "1 checkpoints in" in said[0]
    assert "are of another recipe" in said[0]
    passed = [line.split(" is passed over: ")[0] for line in said[1:]]
    assert [line.rsplit("-", 2)[1] for line in passed] == ["110", "100"]
    trajectory(again, progress, checkpoints, until=3)
    # The new ones stay, and nothing else does.
    assert steps_in(tmp_path) == [2, 3]


def test_a_checkpoint_that_can_not_be_opened_stops_rather_than_begin_anew(tmp_path, monkeypatch):
    setup = make_setup(**SETTINGS)
    trajectory(setup, Progress(), stored(setup, tmp_path), until=2)
    real = open

    def refusing(path, *arguments, **options):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    checkpoints = stored(make_setup(**SETTINGS), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing)
        with pytest.raises(RecipeError, match=r"step-2-\S+ can't be read: Permission denied"):
            checkpoints.latest()
    assert steps_in(tmp_path) == [1, 2]


@dataclasses.dataclass(frozen=True)
class Second(Processes):
    """The second of two processes, of which the first one lists some checkpoints."""

    rank: int = 1
    count: int = 2
    listed: tuple = ()

    def of_first(self, value):
        return list(self.listed)

    def gathered(self, values):
        return values


def test_all_processes_go_on_from_the_file_that_the_first_one_names(tmp_path):
    setup = make_setup(**SETTINGS)
    trajectory(setup, Progress(), stored(setup, tmp_path), until=3)
    found = stored(setup, tmp_path)._found()
    assert [step for step, _, _ in found] == [2, 3]
    gone = (4, found[0][1], str(tmp_path / f"step-4-{found[0][1]}.safetensors"))

    def of_second(*listed):
        again = make_setup(**SETTINGS)
        together = Second(listed=listed)
        return Checkpoints(str(tmp_path), FINGERPRINT, again.tensors, together, seconds=0)

    assert of_second(*found).latest().step == 3
    # The first process doesn't see the newest file, or none.
    assert of_second(found[0]).latest().step == 2
    assert of_second().latest().step == 0
    # The second one doesn't.
    with pytest.raises(RecipeError, match=r"can't be read: No such file or directory \(process 1"):
        of_second(*found, gone).latest()


@contextlib.contextmanager
def room_for(count):
    """Files of so many bytes and no more can be written, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    _, logits = trajectory(make_setup(**SETTINGS))
    setup = make_setup(**SETTINGS)
    checkpoints = stored(setup, tmp_path)

    def on_step(report):
        if report.step == 3:
            # A checkpoint is larger than the one before by a row of the record.
            resource.setrlimit(resource.RLIMIT_FSIZE, (newest(tmp_path).stat().st_size, hard))

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        room_for(hard),
        pytest.raises(RecipeError, match=r"File too large. The last one\s+is as it was"),
    ):
        learn_logits(setup, on_step, nothing, Progress(), checkpoints)
    assert sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()) == [
        "step-1",
        "step-2",
    ]
    again = make_setup(**SETTINGS)
    checkpoints = stored(again, tmp_path)
    _, ends = trajectory(again, checkpoints.latest(), checkpoints)
    assert all(map(torch.equal, ends, logits))


def newest(folder):
    return max(folder.iterdir(), key=lambda path: path.name)


def test_a_disk_without_room_for_a_mask_or_a_merge_loses_nothing(family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    with room_for(9000):
        stopped = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert stopped.exit_code == 1
    assert isinstance(stopped.exception, SystemExit), repr(stopped.exception)
    assert "the mask can't be written to" in stopped.output
    assert "too large" in stopped.output
    assert list((tmp_path / "out").iterdir()) == []
    # Of a mask that is there, and what is to be merged with it.
    learn(family_recipe(), tmp_path / "mask")
    with room_for(500):
        packed = tiny.invoke("mergekit-somf", "pack", tmp_path / "mask", tmp_path / "packed")
    assert "the mask can't be written to" in packed.output
    mask = (tmp_path / "mask/masks.safetensors").stat().st_size
    with room_for(mask + 20_000):
        stopped = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert stopped.exit_code == 1
    assert isinstance(stopped.exception, SystemExit), repr(stopped.exception)
    assert f"the merge can't be written to {tmp_path / 'out'}: " in stopped.output
    again = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert "reusing the mask" in again.output
    assert (tmp_path / "out/model.safetensors").exists()
    assert not list(tmp_path.glob("*somf-*"))


@pytest.mark.slow
def test_a_folder_that_can_not_be_written_is_reported_and_what_is_stored_stays(
    family_recipe, tmp_path
):
    place = tmp_path / "place"
    place.mkdir()
    file = tiny.write_recipe(tmp_path / "recipe.yml", many_steps(family_recipe))
    script = tmp_path / "run.py"
    script.write_text(READ_ONLY)
    early = tiny.run(sys.executable, script, file, place / "mask", "0")
    assert early.returncode == 1, early.stderr
    assert "can't be written: " in early.stderr
    assert list(place.iterdir()) == []
    late = tiny.run(sys.executable, script, file, place / "mask", "4", env=AT_EACH_STEP)
    assert late.returncode == 1, late.stderr
    assert "a checkpoint can't be written to" in late.stderr
    assert "Traceback" not in early.stderr + late.stderr
    assert steps_kept(place / "mask.learning") == 3
    last = started(file, place / "mask")
    assert last.wait(timeout=300) == 0
    assert "going on after step 3" in last.stderr.read()


# Whoever runs the tests may write anywhere: what the system would refuse is refused by the process.
AT_EACH_STEP = {"SOMF_CHECKPOINT_MINUTES": "0"}
READ_ONLY = """
import errno, os, sys, tempfile
*command, step = sys.argv[1:]
place = os.path.dirname(command[1])
steps = []

def read_only(event, arguments):
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if not writes and event not in ("os.mkdir", "os.rename", "os.remove"):
        return
    path = str(arguments[0])
    if os.path.abspath(path).startswith(place):
        steps.extend([path] * path.endswith(".safetensors.partial") * (event == "open"))
        if len(steps) >= int(step):
            raise OSError(errno.EROFS, "Read-only file system", path)

sys.addaudithook(read_only)
from somf_mergekit.cli import main
main(["learn", *command])
"""


def events_of(monkeypatch):
    """The calls, in their order, that put files on the disk, rename and remove them."""
    found, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def fsync(handle):
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        real["fsync"](handle)

    def replaced(old, new):
        found.append(("rename", Path(new).name))
        real["replace"](old, new)

    def unlink(path, **options):
        found.append(("remove", Path(path).name))
        real["unlink"](path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", unlink)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name_and_before_others_go(
    family_recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    events = events_of(monkeypatch)
    learn(family_recipe(max_steps=3), tmp_path / "mask")
    steps = [event for event in events if event[1].startswith("step-") or "learning" in event[1]]
    names = [name for what, name in steps if what == "rename"]
    assert [name.split("-")[1] for name in names] == ["1", "2", "3"]
    writing = [[("sync", f"{n}.partial"), ("rename", n), ("sync", "mask.learning")] for n in names]
    one, two, three = names
    removed = [[], [], [("remove", one)]]
    expected = [e for pair in zip(writing, removed, strict=True) for part in pair for e in part]
    assert steps == [*expected, ("remove", two), ("remove", three)]
    ends = [events.index(("sync", name)) for name in ("masks.safetensors", "somf.json")]
    named = events.index(("rename", "mask"))
    assert max(ends) < named < events.index(("sync", tmp_path.name)) < events.index(steps[-2])


def test_a_checkpoint_is_written_at_the_end_where_much_would_be_lost(tmp_path, monkeypatch):
    setup = make_setup(**SETTINGS)
    trajectory(setup, Progress(), stored(setup, tmp_path, seconds=1e9))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "_END_SECONDS", 0)
    trajectory(setup, Progress(), stored(setup, tmp_path, seconds=1e9))
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()] == ["step-6"]


def test_a_checkpoint_that_a_disk_has_damaged_does_not_count(tmp_path):
    setup = make_setup(**SETTINGS)
    checkpoints = stored(setup, tmp_path)
    trajectory(setup, Progress(), checkpoints, until=2)
    path = newest(tmp_path)
    intact = path.read_bytes()
    good = (vars(checkpoints.latest()), [tensor.whole().clone() for tensor in setup.tensors])
    header = 8 + int.from_bytes(intact[:8], "little")
    counted = []
    for place in [*range(0, header, 41), *range(header, len(intact), 4999), len(intact) - 1]:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        progress = checkpoints.latest()
        if progress.step == 1:
            continue
        counted.append(place)
        assert same(vars(progress), good[0]), place
        assert all(map(torch.equal, (t.whole() for t in setup.tensors), good[1])), place
    # Only blanks between the parts can change.
    assert len(counted) < 3


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_a_file_that_fails_half_way_is_not_there(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.arange(6.0).view(2, 3)
    write_safetensors(
        str(path), [StoredTensor("a", (2, 3), torch.float32, values.clone)], {"k": "v"}
    )
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


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    place, real, other = tmp_path / "mask.learning", FileLock.acquire, []

    def acquire(self, *arguments, **options):
        held = real(self, *arguments, **options)
        if not other:
            # Another process ends, and a third one starts, before this one looks.
            (place / "lock").unlink()
            other.append(FileLock(place / "lock"))
            real(other[0], timeout=0)
        return held

    monkeypatch.setattr(FileLock, "acquire", acquire)
    refused = pytest.raises(RecipeError, match="another process is learning into")
    with refused, learning_folder(str(tmp_path / "mask"), ALONE):
        pass
    other[0].release()
    with learning_folder(str(tmp_path / "mask"), ALONE):
        pass
    assert not place.exists()


def many_steps(family_recipe):
    return family_recipe(max_steps=40, batch_size=2, epochs=9)


LEARN = (sys.executable, "-m", "somf_mergekit", "learn")


def started(file, folder, command=LEARN, **environment):
    return subprocess.Popen(
        [*command, str(file), str(folder)],
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


@pytest.mark.parametrize(
    ("number", "code", "command"),
    [
        (signal.SIGINT, 130, [tiny.command("mergekit-yaml")]),
        (signal.SIGTERM, 143, [*LEARN]),
    ],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.slow
def test_a_signal_ends_after_a_step_and_the_same_command_goes_on(
    number, code, command, family_recipe, tmp_path
):
    file = tiny.write_recipe(tmp_path / "recipe.yml", many_steps(family_recipe))
    learn(many_steps(family_recipe), tmp_path / "whole")
    out = tmp_path / "out"
    mask = out / "somf" if command[0].endswith("yaml") else out
    process = started(file, out, command=command, SOMF_CHECKPOINT_MINUTES="60")
    reported = ""
    # No checkpoint would be written yet, were it not for the signal.
    while " 2/40" not in reported:
        sign = process.stderr.read(1)
        assert sign, reported
        reported += sign
    process.send_signal(number)
    reported += process.communicate(timeout=120)[1]
    assert process.returncode == code, reported
    assert "Traceback" not in reported
    (step,) = re.findall(
        r"stopped after step (\d+), which is stored: give the same command again", reported
    )
    assert 2 <= int(step) < 40
    assert not mask.exists()
    assert steps_kept(mask.with_name(f"{mask.name}.learning")) == int(step)
    again = started(file, out, command=command)
    reported = again.communicate(timeout=300)[1]
    assert again.returncode == 0, reported
    assert f"going on after step {step}" in reported
    assert_same_mask(mask, tmp_path / "whole")


def assert_same_mask(one, other):
    for name in ("masks.safetensors", "somf.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


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

    def failing(self, parts, step, multiplier):
        if step == 2:
            raise error
        real(self, parts, step, multiplier)

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


@pytest.mark.parametrize(
    ("room", "name", "what"),
    [
        (training, "learning_model", "reading task vectors"),
        (mask_storing, "write_masks", "writing the mask"),
    ],
)
def test_memory_that_runs_out_before_or_after_the_steps_is_reported(
    room, name, what, family_recipe, tmp_path, monkeypatch
):
    def failing(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(room, name, failing)
    with pytest.raises(RecipeError, match=f"memory was not enough for {what} .MemoryError"):
        learn(family_recipe(max_steps=1), tmp_path / "mask")


def test_other_errors_are_not_taken_for_a_lack_of_memory(family_recipe, tmp_path, monkeypatch):
    def failing(self, parts, step, multiplier):
        raise RuntimeError("a fault")

    monkeypatch.setattr(ResidentEngine, "learn", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        learn(family_recipe(max_steps=1), tmp_path / "mask")


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_can_be_gone_on_with(family_recipe, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", many_steps(family_recipe))
    whole = started(file, tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    mask, place = tmp_path / "mask", tmp_path / "mask.learning"
    process = started(file, mask)
    wait_for(lambda: steps_kept(place) >= 9, process)
    time.sleep(random.Random(0).random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert steps_kept(place) >= 9
    last = started(file, mask)
    assert last.wait(timeout=300) == 0
    assert "going on after step" in last.stderr.read()
    assert not place.exists()
    assert_same_mask(mask, tmp_path / "whole")
    rows = [json.loads(row) for row in (mask / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
