"""Names from recipes and data are taken as they are: by no shell, pattern, template or terminal."""

import shutil

import pytest
import tiny

from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.common.errors import printable
from somf_mergekit.data.dataset_reading import dataset_rows

NAMES = [
    "{0} {} {x}",
    "%s %(x)s %",
    "; touch x",
    "$(touch x)`touch x`",
    "pairs[1]",
    "pairs*",
    "é '\"",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_by_its_name_alone(tmp_path, name):
    for other in ("pairs1", "pairs2", name):
        tiny.write_jsonl(tmp_path / f"{other}.jsonl", [{"prompt": other}])
    rows = dataset_rows(str(tmp_path / f"{name}.jsonl"))
    assert [row["prompt"] for row in rows] == [name]


def test_a_folder_whose_name_would_be_a_pattern_is_refused(tmp_path):
    for name in ("pairs1", "pairs[1]"):
        (tmp_path / name).mkdir()
        tiny.write_jsonl(tmp_path / name / "rows.jsonl", [{"prompt": name}])
    assert [row["prompt"] for row in dataset_rows(str(tmp_path / "pairs1"))] == ["pairs1"]
    with pytest.raises(RecipeError, match="would be taken for a pattern"):
        dataset_rows(str(tmp_path / "pairs[1]"))


def test_a_whole_merge_with_odd_names(family, tmp_path, monkeypatch):
    folder = tmp_path / "{0} %s; touch x $(touch x)"
    folder.mkdir()
    names = {"base": "{} base", "math": "%(x)s;touch x", "code": "$(touch x) {0}"}
    for name, odd in names.items():
        shutil.copytree(family / name, folder / odd)
    data = folder / "{0}%s[1].jsonl"
    shutil.copy(family / "pairs.jsonl", data)
    monkeypatch.chdir(tmp_path)
    recipe = tiny.recipe(
        folder / names["base"],
        [folder / names["math"], folder / names["code"]],
        safety_dataset=str(data),
        max_steps=1,
        batch_size=4,
        max_length=48,
    )
    found = tiny.merged(recipe, folder / "out {}")
    assert set(found) == set(tiny.tensors_of(family / "base"))
    reported = MaskSet.open(folder / "out {}").provenance
    assert reported["dataset"]["source"] == str(data)
    assert set(reported["models"]) == {str(folder / odd) for odd in names.values()}
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    checked = tiny.invoke("mergekit-somf", "verify", folder / "out {}", "--strict")
    assert checked.exit_code == 0, checked.output


def test_folders_that_might_be_names_on_the_hub_need_no_network(
    family, tmp_path, monkeypatch, family_recipe
):
    """The tests are offline: whoever asks the hub meets an error."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(family / "base", "base")
    for name in ("math", "code"):
        shutil.copytree(family / name, f"models/{name}")
    recipe = family_recipe(max_steps=1)
    recipe["base_model"] = "base"
    recipe["models"] = [
        {"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("math", "code")
    ]
    tiny.merged(recipe, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "README.md", "mergekit_config.yml", "somf"} <= written
    assert (tmp_path / "out/somf/report.md").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "SOMF](https://arxiv.org/abs/2405.09055) merge method using ./base as a base" in card
    assert "* ./models/math\n" in card
    assert "huggingface.co/models" not in card


@pytest.mark.parametrize("name", ["../../etc", "; touch x", "{0}%s", "$(touch x)", "a\x1b[2Jb"])
@pytest.mark.parametrize("key", ["safety_dataset", "mask", "fusion", "model", "utility_dataset"])
def test_names_that_are_none_are_reported_and_nothing_is_made(
    family_recipe, tmp_path, monkeypatch, name, key
):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    if key == "model":
        recipe = family_recipe()
        recipe["models"][0]["model"] = name
    else:
        recipe = family_recipe(**{"safety_dataset": None, key: name})
        if key != "mask" and key != "safety_dataset":
            recipe = family_recipe(**{key: name})
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "\x1b" not in result.output
    reported = " ".join(result.output.split("Error: ", 1)[1].split())
    assert (name if name.isprintable() else "x1b[2Jb") in reported
    assert [p.name for p in tmp_path.rglob("*") if p.name == "x"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) in (
        ["in", "recipe.yml"],
        ["in", "out", "recipe.yml"],
    )


def test_paths_that_lead_nowhere(family, family_recipe, tmp_path, monkeypatch):
    """Each is said to be what it is, and none is taken for an id on the hub."""
    for name in ("a+b", "user@host"):
        shutil.copytree(family / "math", tmp_path / name / "model")
    monkeypatch.setenv("HOME", "/home/someone")
    nowhere = "there is no such folder, and it can't be an id on the hub (ORGANISATION/NAME)"
    windows = "this is a Windows path; give the path of the folder on this machine"
    parted = "mergekit takes the + in this path for BASE+ADAPTER and an @ for PATH@REVISION: rename"
    expected = {
        r"C:\models\x": windows,
        "D:/models/x": windows,
        r"E:\base+E:\adapter": rf"E:\base: {windows}",
        f"{family / 'base'}+/gone/adapter": f"/gone/adapter: {nowhere}",
        r"models\x": nowhere,
        "/gone/model": nowhere,
        "~/model": "mergekit doesn't expand ~: write /home/someone/model",
        "https://hub/a/b": "mergekit takes no address: give the model's id on the hub",
        f"{tmp_path}/a+b/model": parted,
        f"{tmp_path}/user@host/model": parted,
    }
    recipe = family_recipe()
    recipe["models"] += [{"model": name, "parameters": {"weight": 0.1}} for name in expected]
    said = tiny.refused(recipe, tmp_path)
    assert f"{len(expected)} problems" in said
    for name, why in expected.items():
        assert f"- model {name}: {why}" in said
    for name in (f"{tmp_path}/c++/model", "a@b@c"):
        recipe["models"][0]["model"] = name
        file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
        result = tiny.invoke("mergekit-somf", "check", file)
        assert f"{name}; mergekit takes a + for BASE+ADAPTER" in " ".join(result.output.split())


def test_columns_with_signs_that_steer_a_terminal(family_recipe, tmp_path):
    rows = [{"quest\x1b]0;ion": "a", "answ\u202eer": "b"}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tiny.write_recipe(tmp_path / "r.yml", family_recipe(safety_dataset=str(file)))
    result = tiny.invoke("mergekit-somf", "check", recipe)
    assert result.exit_code == 1
    assert "quest\\x1b]0;ion, answ\\u202eer" in result.output
    assert "\x1b" not in result.output


def test_what_can_be_printed_stays():
    assert printable("line\nänother {}") == "line\nänother {}"
    assert printable("\ud800\r\x00") == "\\ud800\\r\\x00"


def test_recipes_are_reported_as_mergekit_reports_them(family_recipe):
    from mergekit.config import MergeConfiguration

    from somf_mergekit.recipe.blocks import recipe_text

    content = family_recipe(learning_rate=[{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 1}])
    content["tokenizer"] = {"source": "union", "tokens": {"<x>": {"source": "org/model@main"}}}
    content["models"][0]["model"] = "org/model+org/adapter"
    config = MergeConfiguration.model_validate(content)
    assert recipe_text(config) == config.to_yaml()
    content["base_model"] = "/My Models/aligned"
    reported = recipe_text(MergeConfiguration.model_validate(content))
    assert "base_model: /My Models/aligned\n" in reported
