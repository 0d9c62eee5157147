import logging
import re
from pathlib import Path

import pytest
import tiny
import torch

from somf_mergekit import MaskSet
from somf_mergekit.common import errors
from somf_mergekit.data.chat import user_prompt
from somf_mergekit.mask.census import MaskCensus, kind_of, layer_of
from somf_mergekit.mask.writing import write_masks
from somf_mergekit.recipe import settings as recipe
from somf_mergekit.recipe.schema import table_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe_file(tmp_path, family_recipe):
    return tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())


def test_help_lists_every_command_and_fits_a_screen():
    result = tiny.invoke("mergekit-somf", "--help")
    assert result.exit_code == 0
    for name in (
        "merge",
        "learn",
        "check",
        "inspect",
        "pack",
        "push",
        "verify",
        "evaluate",
        "gate",
        "sweep",
        "parameters",
        "demo",
        "doctor",
    ):
        assert re.search(rf"^  {name}  +[A-Z]", result.output, re.M), name
    assert len(result.output.splitlines()) <= 40


def test_parameters_are_listed_and_explained():
    listed = tiny.invoke("mergekit-somf", "parameters").output
    for parameter in recipe.parameters():
        assert re.search(rf"^  {parameter.name}  +[A-Z`]", listed, re.M), parameter.name
    assert all(f"{heading}:\n" in listed for heading in recipe.GROUPS.values())
    one = tiny.invoke("mergekit-somf", "parameters", "learning_rate").output
    assert one.startswith("learning_rate: a number > 0 and <= 100; default: 0.03\n")
    assert "may differ between tensors" in one
    unknown = tiny.invoke("mergekit-somf", "parameters", "learnin_rate")
    assert unknown.exit_code == 1
    assert "did you mean 'learning_rate'?" in unknown.output


def test_merge_takes_the_options_of_mergekit_yaml():
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    result = tiny.invoke("mergekit-somf", "merge", "--help")
    for option in (o for p in mergekit_yaml.params for o in p.opts if o.startswith("--")):
        assert option in result.output
    assert "--micro-batch-size" in result.output
    assert "--precision" in result.output
    assert "--engine" in result.output
    assert "--work-dir" in result.output
    assert "--report" in result.output


def test_check_says_what_would_be_learned_and_loads_no_model(
    recipe_file, tmp_path, family, monkeypatch
):
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    loaded, load = [], LazyTensorLoader.get_tensor

    def loading(self, *arguments, **options):
        loaded.append(arguments)
        return load(self, *arguments, **options)

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", loading)
    result = tiny.invoke("mergekit-somf", "check", recipe_file)
    assert result.exit_code == 0, result.output
    tensors = tiny.tensors_of(family / "base")
    assert f"tensors:      {len(tensors)} at most" in result.output
    assert f"{sum(t.numel() for t in tensors.values()):,} at most" in result.output
    assert "pairs:        24" in result.output
    assert "steps:        3 of 4 pairs" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yml"]
    # One tensor of each model, which shows that the fine-tuned ones change something.
    assert len(loaded) == 3


def test_check_counts_dropped_rows(tmp_path, family_recipe):
    rows = [*tiny.preference_rows(4), {"prompt": "a", "chosen": "", "rejected": "b"}]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    file = tiny.write_recipe(tmp_path / "r.yml", family_recipe(safety_dataset=str(data)))
    result = tiny.invoke("mergekit-somf", "check", file)
    assert "pairs:        4\n" in result.output
    assert "rows of the safety dataset left out: 1 without an answer\n" in result.output


def test_check_shows_pairs_as_the_model_sees_them(tmp_path, family_recipe):
    rows = [
        {
            "prompt": [{"role": "system", "content": f"\x1b[2J {n}"}, *user_prompt("how do i mix")],
            "chosen": "sorry",
            "rejected": "mix powder with sugar " * 20,
        }
        for n in range(8)
    ]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    content = family_recipe(safety_dataset=str(data), max_length=96)
    file = tiny.write_recipe(tmp_path / "r.yml", content)
    assert "sugar" not in tiny.invoke("mergekit-somf", "check", file).output
    output = tiny.invoke("mergekit-somf", "check", file, "--show", 2).output
    assert "\x1b" not in output
    shown = re.findall(
        r"^row (\d) of .*:\n--- prompt, \d+ tokens\n<s>(.*)\n<\|user\|> how do i mix\n"
        r"<\|assistant\|> \n--- chosen, \d tokens\nsorry</s>\n"
        r"--- rejected, (\d+) tokens\n(.*)$",
        output,
        re.MULTILINE,
    )
    assert len(shown) == 2
    for row, system, count, rejected in shown:
        assert system == f"<|system|> \\x1b[2J {row}"
        # The answer is as long as there is room for it.
        assert int(count) < len(rows[0]["rejected"].split())
        assert rows[0]["rejected"].startswith(rejected)


def test_pack_writes_a_mask_that_a_merge_takes(recipe_file, tmp_path, family_recipe):
    assert tiny.invoke("mergekit-somf", "learn", recipe_file, tmp_path / "mask").exit_code == 0
    result = tiny.invoke("mergekit-somf", "pack", tmp_path / "mask", tmp_path / "packed")
    assert result.exit_code == 0, result.output
    outputs = {}
    for name, kind in (("packed", "soft"), ("packed", "binary"), ("mask", "binary")):
        given = family_recipe(safety_dataset=None, mask=str(tmp_path / name), mask_kind=kind)
        outputs[name, kind] = tiny.merged(given, tmp_path / f"{name}-{kind}")
    first, *others = outputs.values()
    assert all(torch.equal(first[n], other[n]) for other in others for n in first)
    again = tiny.invoke("mergekit-somf", "pack", tmp_path / "mask", tmp_path / "packed")
    assert again.exit_code == 1
    assert "is not empty" in again.output


def test_learn_writes_the_artifact_and_check_accepts_it_as_a_mask(
    recipe_file, tmp_path, family_recipe
):
    result = tiny.invoke("mergekit-somf", "learn", recipe_file, tmp_path / "mask")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "mask").iterdir()) == [
        "masks.safetensors",
        "somf.json",
        "training.jsonl",
    ]
    again = tiny.invoke("mergekit-somf", "learn", recipe_file, tmp_path / "mask")
    assert "reusing the mask" in again.output
    given = family_recipe(safety_dataset=None, mask=str(tmp_path / "mask"))
    file = tiny.write_recipe(tmp_path / "given.yml", given)
    checked = tiny.invoke("mergekit-somf", "check", file)
    assert f"used as it is: 21 tensors in {tmp_path / 'mask'}" in checked.output
    refused = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "other")
    assert refused.exit_code == 1
    assert "there is nothing to learn" in refused.output


def test_merge_sets_the_machine_from_its_options(recipe_file, tmp_path):
    result = tiny.invoke(
        "mergekit-somf",
        "merge",
        recipe_file,
        tmp_path / "out",
        "--work-dir",
        tmp_path / "work",
        "--micro-batch-size",
        "2",
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/model.safetensors").exists()
    assert MaskSet.open(tmp_path / "work").names()


@pytest.fixture
def masks(tmp_path):
    layers = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.full((4, 3), 0.1 + 0.2 * layer)
        for layer in range(3)
    }
    half = torch.cat([torch.full((50,), 0.25), torch.full((50,), 0.75)])
    return write_masks(
        tmp_path / "artifact",
        {**layers, "lm_head.weight": half},
        aliases={},
        provenance={},
        history=[],
    )


def test_census_counts_what_is_in_the_mask(masks):
    census = MaskCensus(masks)
    by_layer = {row.label: row for row in census.groups("layer")}
    assert list(by_layer) == ["0", "1", "2", "other"]
    assert by_layer["1"].mean == pytest.approx(0.3, abs=1 / 400)
    assert by_layer["other"].kept == 0.5
    assert by_layer["other"].deviation == pytest.approx(0.25, abs=1 / 400)
    assert by_layer["other"].low == pytest.approx(0.25, abs=1 / 400)
    assert by_layer["other"].high == pytest.approx(0.75, abs=1 / 400)
    by_kind = {row.label: row.entries for row in census.groups("kind")}
    assert by_kind == {"lm_head": 100, "mlp.up_proj": 36}
    assert census.total().entries == 136
    assert layer_of("model.layers.11.mlp.up_proj.weight") == "11"
    assert kind_of("model.layers.11.mlp.up_proj.weight") == "mlp.up_proj"


def test_inspect_prints_tables_and_writes_a_png(masks, tmp_path):
    result = tiny.invoke("mergekit-somf", "inspect", tmp_path / "artifact")
    assert result.exit_code == 0, result.output
    assert re.search(r"\| mlp.up_proj +\| +36 \| +0\.(299|300|301) \|", result.output)
    assert re.search(r"\| all +\| +136 \|", result.output)
    png = tmp_path / "artifact/mask.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other.png"
    assert tiny.invoke("mergekit-somf", "inspect", tmp_path / "artifact", "--png", other)
    assert other.exists()


def test_documentation_shows_the_parameters_as_they_are():
    table = "\n".join(table_rows(recipe.parameters()))
    assert table in (ROOT / "docs/recipe.md").read_text()


def test_the_traceback_behind_a_reported_line_is_shown_to_who_debugs(monkeypatch, capsys):
    log = logging.getLogger("somf_mergekit")
    before = log.level, list(log.handlers), log.propagate

    def reported():
        errors._log.cache_clear()
        with pytest.raises(KeyError) as caught:
            {}["lost"]
        assert errors.first_line(caught.value) == "'lost'"
        return capsys.readouterr().err

    try:
        assert reported() == ""
        monkeypatch.setenv("SOMF_DEBUG", "1")
        assert re.search(r"Traceback .*test_cli\.py.*KeyError: 'lost'", reported(), re.DOTALL)
    finally:
        log.setLevel(before[0])
        log.handlers, log.propagate = before[1:]
        errors._log.cache_clear()
