"""The notebook runs from top to bottom, with the demo's data and small models."""

import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from somf_mergekit import MaskSet
from somf_mergekit.demo.demo_data import demo_data, preference_rows, texts
from somf_mergekit.demo.demo_models import DemoSettings, new_llama, save_model, word_tokenizer

NOTEBOOK = Path(__file__).parent.parent / "examples/notebook/somf.ipynb"
LAYERS = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def inputs(tmp_path):
    """Values for the form: an untrained model of the demo's kind, two adapters, its data."""
    settings = DemoSettings(hidden_size=32, layers=2)
    data = demo_data(0, train=60, held_out=8)
    tokenizer = word_tokenizer(texts(data))
    base = tmp_path / "base"
    save_model(new_llama(tokenizer, settings, 0), tokenizer, base)
    pairs = tiny.write_jsonl(
        tmp_path / "pairs.jsonl", preference_rows(data, harmful=30, harmless=30, seed=0)
    )
    prompts = [{"prompt": messages[-1]["content"]} for messages, _ in data.refused.held_out]
    skill = [{"prompt": m[-1]["content"], "response": a} for m, a in data.numbers.held_out]
    return {
        "BASE": str(base),
        "FIRST_ADAPTER": str(tiny.save_adapter(base, tmp_path / "first", 1, **LAYERS)),
        "SECOND_ADAPTER": str(tiny.save_adapter(base, tmp_path / "second", 2, **LAYERS)),
        "SAFETY_PAIRS": str(pairs),
        "STEPS": 4,
        "BASE_PRECISION": "4bit",
        "HARMFUL_PROMPTS": str(tiny.write_jsonl(tmp_path / "harmful.jsonl", prompts)),
        "SKILL": str(tiny.write_jsonl(tmp_path / "skill.jsonl", skill)),
        "PROMPTS": 4,
        "PUBLISH_AS": "org/mask",
    }


def cells():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield cell["metadata"].get("tags", []), "".join(cell["source"])


def run(values, folder, **environment):
    """Run the notebook's code, but for what it installs, with values in its form."""
    sources = []
    for tags, source in cells():
        sources += [] if "install" in tags else [source]
        if "parameters" in tags:
            assert all(f"{name} = " in source for name in values)
            sources += [f"{name} = {value!r}" for name, value in values.items()]
    file = folder.with_suffix(".py")
    file.write_text("\n\n".join(sources))
    folder.mkdir()
    commands = os.path.dirname(tiny.command("mergekit-yaml"))
    environment["PATH"] = os.pathsep.join([commands, os.environ["PATH"]])
    return tiny.run(sys.executable, file, env=environment, cwd=folder)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(inputs, hub, tmp_path):
    place = tmp_path / "place"
    ended = run(inputs, place, **hub.environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the base's linear layers are in 4 bits" in ended.stdout
    assert "4 steps will take about" in ended.stdout
    assert "learned in 4 steps on a base in 4 bits" in ended.stdout
    mask = MaskSet.open(place / "mask")
    assert mask.provenance["steps"] == 4
    merged, plain = (tiny.tensors_of(place / name) for name in ("merged", "plain-merge"))
    assert merged.keys() == plain.keys()
    changed = {name for name, weight in merged.items() if not weight.equal(plain[name])}
    assert changed == set(mask.names())
    table = (place / "measured/evaluation.md").read_text()
    assert table in ended.stdout
    assert all(name in table for name in ("base", "plain", "masked", "refusals", "skill"))
    assert "masks.safetensors" in hub.repositories["org/mask"].files


@pytest.mark.slow
def test_it_stops_where_a_command_fails(inputs, tmp_path):
    ended = run({**inputs, "FIRST_ADAPTER": str(tmp_path / "nowhere")}, tmp_path / "place")
    assert ended.returncode == 1
    assert "nowhere" in ended.stdout
    assert "RuntimeError: failed: mergekit-somf check" in ended.stderr
    assert not (tmp_path / "place" / "trial.yml").exists()


def test_it_has_no_outputs_and_one_form():
    found = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in found["cells"])
    assert sum("parameters" in tags for tags, _ in cells()) == 1
