"""The report of whole merges, its numbers compared with what the written tensors say."""

import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata, merge_state_dicts
from PIL import Image

from somf_mergekit import MaskSet
from somf_mergekit.fusion.masked_fusion import show_task_vectors
from somf_mergekit.mask.census import Collapse, MaskCensus, kind_of, layer_of
from somf_mergekit.mask.writing import write_masks, write_packed_masks
from somf_mergekit.report.card import with_section
from somf_mergekit.report.content import curve_rows
from somf_mergekit.report.merge_report import peak_memory
from somf_mergekit.report.report_text import collapse_list
from somf_mergekit.report.vectors import TaskVectors, TensorRecord

MODELS = ("math", "code")


def merge(recipe, folder, *options):
    file = tiny.write_recipe(folder.parent / f"{folder.name}.yml", recipe)
    result = tiny.invoke("mergekit-yaml", file, folder, *options)
    assert result.exit_code == 0, result.output
    return result.output


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def recipe_of(family, **parameters):
    return tiny.recipe(family / "base", [family / name for name in MODELS], **parameters)


@pytest.fixture(scope="module")
def reported(family, tmp_path_factory):
    """A merge with all of its report: lm_head has no mask, and there is a utility term."""
    folder = tmp_path_factory.mktemp("reported")
    utility = [{"prompt": r["prompt"], "answer": r["chosen"]} for r in tiny.preference_rows(6)]
    rows = [*tiny.preference_rows(), {"prompt": "a", "chosen": "", "rejected": "b"}]
    recipe = recipe_of(
        family,
        safety_dataset=str(tiny.write_jsonl(folder / "pairs.jsonl", rows)),
        utility_dataset=str(tiny.write_jsonl(folder / "utility.jsonl", utility)),
        exclude="lm_head",
        max_steps=11,
        epochs=2,
        batch_size=4,
        max_length=48,
        learning_rate=0.4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOMF_REPORT", "full")
        output = merge(recipe, folder / "out")
    somf = folder / "out/somf"
    return SimpleNamespace(
        folder=folder, recipe=recipe, somf=somf, report=report_of(somf), output=output
    )


def test_the_files_of_a_report(reported):
    assert sorted(path.name for path in reported.somf.iterdir()) == [
        "masks.safetensors",
        "report.json",
        "report.md",
        "report.png",
        "somf.json",
        "training.jsonl",
    ]
    assert f"somf: report in {reported.somf / 'report.md'}" in reported.output
    text = (reported.somf / "report.md").read_text()
    assert "(report.png)" in text
    for heading in ("Learning", "What the mask keeps", "Task vectors", "Circumstances"):
        assert text.count(f"\n## {heading}\n") == 1
    assert "Missing from this report" not in text


def test_the_plots_are_an_image(reported):
    with Image.open(reported.somf / "report.png") as image:
        image.load()
        assert 1000 <= image.width <= 3000
        assert 600 <= image.height <= 3000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_curve_is_that_of_learning(reported):
    history = [
        json.loads(line) for line in (reported.somf / "training.jsonl").read_text().splitlines()
    ]
    rows = reported.report["learning"]["curve"]
    assert [row["first"] for row in rows] == [1, *(row["last"] + 1 for row in rows[:-1])]
    assert rows[-1]["last"] == len(history) == 11
    for row in rows:
        steps = history[row["first"] - 1 : row["last"]]
        for key in ("loss", "accuracy", "margin", "utility"):
            assert row[key] == pytest.approx(sum(step[key] for step in steps) / len(steps))
        assert row["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))


def test_a_curve_may_be_short_and_lack_a_margin():
    history = [
        {"step": n, "loss": n, "accuracy": None, "margin": None, "utility": None, "seconds": 1}
        for n in (1, 2, 3)
    ]
    rows = curve_rows(history)
    assert [(row.first, row.last, row.loss, row.accuracy) for row in rows] == [
        (1, 1, 1, None),
        (2, 2, 2, None),
        (3, 3, 3, None),
    ]
    assert curve_rows([]) == []


def assert_summary(row, entries):
    entries = entries.double().sort().values
    count = len(entries)
    assert row["entries"] == count
    assert row["mean"] == pytest.approx(float(entries.mean()))
    assert row["deviation"] == pytest.approx(float(entries.std(correction=0)))
    assert row["kept"] == pytest.approx(float((entries > 0.5).double().mean()))
    for key, share in (("low", 0.05), ("high", 0.95)):
        assert row[key] == pytest.approx(float(entries[math.ceil(share * count) - 1]))


def test_the_mask_is_summarised_as_it_is(reported):
    masks, mask = MaskSet.open(reported.somf), reported.report["mask"]
    names = masks.names()
    assert "lm_head.weight" not in names
    assert (mask["origin"], mask["tensors"], mask["tensors_without"]) == ("learned", 20, 1)

    def entries(chosen):
        return torch.cat([masks.entries(name).flatten() for name in names if chosen(name)])

    assert_summary(mask["total"], entries(lambda name: True))
    assert {row["label"] for row in mask["kinds"]} == set(map(kind_of, names))
    for group, label_of in (("layers", layer_of), ("kinds", kind_of), ("by_tensor", str)):
        for row in mask[group]:
            assert_summary(row, entries(lambda n, of=label_of, row=row: of(n) == row["label"]))
    assert [row["label"] for row in mask["layers"]] == ["0", "1", "other"]
    assert sorted(row["label"] for row in mask["by_tensor"]) == names
    assert mask["collapsed"] == []


def flat(vectors, names):
    return torch.cat([vectors[name].flatten() for name in names])


def assert_task_vectors(report, family, factor):
    """Compare norms and cosines with those of the tensors, laid out as one vector."""
    base = tiny.tensors_of(family / "base")
    before = {}
    for model in MODELS:
        tensors = tiny.tensors_of(family / model)
        before[model] = {n: tensors[n].double() - base[n].double() for n in base}
    after = {m: {n: v * factor(n).double() for n, v in t.items()} for m, t in before.items()}
    groups = report["task_vectors"]["groups"]
    assert {g["label"] for g in groups} == {*map(kind_of, base), "all"}
    for group in groups:
        names = [n for n in base if group["label"] in (kind_of(n), "all")]
        for found, vectors in ((group["before"], before), (group["after"], after)):
            one, two = (flat(vectors[model], names) for model in MODELS)
            norms = {str(family / m): float(flat(vectors[m], names).norm()) for m in MODELS}
            assert found["norms"] == pytest.approx(norms, rel=1e-5)
            (pair,) = found["cosines"]
            assert pair["models"] == list(norms)
            if all(norms.values()):
                cosine = float(one @ two / (one.norm() * two.norm()))
                assert pair["cosine"] == pytest.approx(cosine, abs=1e-5)
            else:
                assert pair["cosine"] is None


def mask_factor(masks, kind="soft", rescale="mean"):
    def factor(name):
        if name not in masks:
            return torch.ones(1)
        p = masks.probabilities(name)
        mask = (p > 0.5).float() if kind == "binary" else p
        return mask / mask.mean() if rescale == "mean" and mask.any() else mask

    return factor


def test_norms_and_cosines_are_those_of_the_task_vectors(reported, family):
    assert_task_vectors(reported.report, family, mask_factor(MaskSet.open(reported.somf)))


def test_norms_are_of_what_is_fused_whatever_the_fusion(reported, family, tmp_path):
    given = recipe_of(
        family,
        mask=str(reported.somf),
        mask_kind="binary",
        mask_rescale="none",
        fusion="ties",
        density=0.5,
    )
    merge(given, tmp_path / "out")
    report = report_of(tmp_path / "out/somf")
    assert report["mask"]["origin"] == "given"
    # The curve is that of the mask's own learning.
    assert report["learning"]["curve"] == reported.report["learning"]["curve"]
    factor = mask_factor(MaskSet.open(reported.somf), "binary", "none")
    assert_task_vectors(report, family, factor)


def test_circumstances(reported):
    report = reported.report
    said = json.loads((reported.somf / "somf.json").read_text())
    data = report["learning"]["dataset"]
    assert (data["pairs"], data["left_out"]) == (24, "1 without an answer")
    assert report["learning"]["utility_dataset"]["examples"] == 6
    assert report["learning"]["steps"] == 11
    assert report["merge"]["settings"]["learning_rate"] == 0.4
    assert report["merge"]["fusion"] == "task_arithmetic"
    assert report["learning"]["learned_with"] == said["learned_with"]
    assert said["learned_with"] == {
        "engine": "resident",
        "precision": said["learned_with"]["precision"],
        "device": "cpu",
        "processes": 1,
        "micro_batch": 4,
    }
    assert said["learned_with"]["precision"] in ("float32", "bfloat16")
    assert "torch" in report["versions"]
    seconds = report["seconds"]
    assert {"planning", "learning", "merging", "report"} <= set(seconds)
    assert all(value >= 0 for value in seconds.values())
    steps = sum(row["seconds"] for row in report["learning"]["curve"])
    assert seconds["learning"] >= steps
    assert report["peak_memory_bytes"]["process"] > 50 << 20
    assert report["failures"] == []


def test_the_peak_is_that_of_the_device_that_merged(monkeypatch):
    peaks = {"cuda": 1, "cuda:0": 1, "cuda:1": 2}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device="cuda:0": peaks[device])
    assert peak_memory("cuda:1")["device"] == 2
    assert "device" not in peak_memory("cpu")


def test_no_text_of_the_data_is_reported(reported):
    for file in ("out/README.md", "out/somf/report.md", "out/somf/report.json"):
        text = (reported.folder / file).read_text().lower()
        assert not [word for word in ("sorry", "powder", "flour", "how do i") if word in text]


def test_the_card_has_one_section_and_its_metadata(reported, monkeypatch):
    monkeypatch.setenv("SOMF_ENGINE", "streaming")
    out = reported.folder / "out"
    before = (out / "README.md").read_text()
    section = before.split("<!-- somf: begin -->")[1]
    assert section.count("## Safety") == 1
    assert "[report](somf/report.md)" in section
    assert "were not measured" in section
    # How a mask is learned decides nothing: another engine's is the same.
    output = merge(reported.recipe, out)
    assert "reusing the mask" in output
    assert report_of(reported.somf)["mask"]["origin"] == "reused"
    # The plots of the run before are not those of this report.
    assert not (reported.somf / "report.png").exists()
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["mergekit", "merge"]
    assert card.content.count("## Safety") == 1
    assert "learned by an earlier run" in card.content


def test_a_section_takes_the_place_of_an_earlier_one():
    card = "---\na: 1\n---\n# Name\n"
    once = with_section(card, "## Safety\n\none")
    assert once.startswith(card)
    changed = once + "\nwritten by hand\n"
    again = with_section(changed, "## Safety\n\ntwo")
    assert again == changed.replace("one", "two")


def written_mask(folder, family, values):
    """A mask with the probabilities ``values`` of some tensors, 0.2 and 0.7 in turn in others."""
    tensors = tiny.tensors_of(family / "base")
    masks = {}
    for name, tensor in tensors.items():
        masks[name] = torch.full(tensor.shape, 0.2)
        masks[name].view(-1)[::2] = 0.7
        if name in values:
            masks[name] = torch.full(tensor.shape, values[name])
    return write_masks(folder, masks, aliases={}, provenance={}, history=[])


COLLAPSED = {
    "model.layers.0.mlp.up_proj.weight": 0.99,
    "model.layers.1.mlp.up_proj.weight": 0.01,
    "model.layers.0.mlp.down_proj.weight": 0.45,
    "model.layers.1.mlp.down_proj.weight": 0.8,
}


def test_collapsed_masks_are_named(family, tmp_path):
    stored, dropped, empty, full = COLLAPSED
    masks = written_mask(tmp_path / "mask", family, COLLAPSED)
    merge(recipe_of(family, mask=masks.path, mask_kind="binary"), tmp_path / "out")
    report = report_of(tmp_path / "out/somf")
    collapsed = {row["what"]: set(row["tensors"]) for row in report["mask"]["collapsed"]}
    assert collapsed == {
        "all kept": {stored},
        "all dropped": {dropped},
        "binary mask full": {stored, full},
        "binary mask empty": {dropped, empty},
        "even": set(COLLAPSED),
    }
    text = (tmp_path / "out/somf/report.md").read_text()
    (line,) = [row for row in text.splitlines() if row.startswith("- **binary mask empty**")]
    assert f"2 tensors: `{empty}`, `{dropped}`" in line
    assert_task_vectors(report, family, mask_factor(masks, "binary"))
    found, base = tiny.tensors_of(tmp_path / "out"), tiny.tensors_of(family / "base")
    assert torch.equal(found[empty], base[empty])
    assert "There is no training curve." in text
    # Tensor by tensor, for programs.
    rows = {row["label"]: row["collapsed"] for row in report["mask"]["by_tensor"]}
    assert rows[dropped] == ["all dropped", "binary mask empty", "even"]
    assert [name for name in rows if rows[name]] == sorted(COLLAPSED)
    inspected = tiny.invoke("mergekit-somf", "inspect", tmp_path / "mask")
    assert "- **binary mask empty** (no probability is above 0.5" in inspected.output
    assert f"2 tensors: `{empty}`, `{dropped}`" in inspected.output


def test_a_stray_entry_hides_no_collapse(tmp_path):
    stored, stray, partly = (torch.full((40, 10), 0.99) for _ in range(3))
    stray[0, :4], partly[0, :5] = 0.3, 0.3
    probabilities = {"kept": stored, "stray": stray, "partly": partly, "dropped": 1 - stray}
    masks = write_masks(tmp_path / "m", probabilities, aliases={}, provenance={}, history=[])
    collapsed = {c.what: c.tensors for c in MaskCensus(masks).collapses()}
    assert collapsed == {
        "all kept": ["kept", "stray"],
        "all dropped": ["dropped"],
        "binary mask full": ["kept"],
        "even": ["kept"],
    }


def test_many_collapsed_masks_are_named_by_kind_and_layer():
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(12)]
    text = collapse_list([Collapse("all kept", "so", [*names, "model.norm.weight"])])
    layers = " ".join(map(str, range(12)))
    assert text.endswith(f"13 tensors: `mlp.up_proj` (layers {layers}), `model.norm`")


def test_collapsed_masks_are_counted_when_they_have_been_learned(family, tmp_path):
    recipe = recipe_of(
        family,
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=4,
        batch_size=6,
        max_length=48,
        granularity="tensor",
        mask_rescale="none",
        learning_rate=20.0,
        include="mlp",
    )
    output = merge(recipe, tmp_path / "out")
    mask = report_of(tmp_path / "out/somf")["mask"]
    collapsed = {name for row in mask["collapsed"] for name in row["tensors"]}
    ways = ", ".join(f"{row['what']} {len(row['tensors'])}" for row in mask["collapsed"])
    assert len(collapsed) > 3
    assert f"; the masks of {len(collapsed)} of 6 tensors have collapsed ({ways})\n" in output


def test_packed_masks_are_summarised_as_zeros_and_ones(family, tmp_path):
    masks = write_packed_masks(
        tmp_path / "packed", written_mask(tmp_path / "mask", family, COLLAPSED)
    )
    total = asdict(MaskCensus(masks).total())
    assert_summary(total, torch.cat([masks.entries(n).flatten() for n in masks.names()]))
    assert total["mean"] == total["kept"]


def test_layers_that_are_stacked_are_reported_by_where_they_are(family, tmp_path):
    values = {"model.layers.0.mlp.up_proj.weight": 0.01}
    masks = written_mask(tmp_path / "mask", family, values)
    models = [str(family / name) for name in ("base", *MODELS)]
    slices = [
        {
            "sources": [
                {"model": model, "layer_range": part, "parameters": {"weight": 0.5}}
                for model in models
            ]
        }
        for part in ([0, 2], [0, 1])
    ]
    recipe = recipe_of(family, mask=masks.path) | {"slices": slices}
    del recipe["models"]
    merge(recipe, tmp_path / "out")
    collapsed = report_of(tmp_path / "out/somf")["mask"]["collapsed"]
    (dropped,) = [row for row in collapsed if row["what"] == "all dropped"]
    assert dropped["tensors"] == [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 2)]


def test_experts_are_of_one_kind():
    names = [f"model.layers.3.mlp.experts.{number}.up_proj.weight" for number in (0, 11)]
    assert {kind_of(name) for name in names} == {"mlp.experts.*.up_proj"}
    assert {layer_of(name) for name in names} == {"3"}


def test_the_report_is_chosen_on_the_machine_and_changes_no_tensor(
    reported, family, tmp_path, monkeypatch
):
    harm = tiny.write_jsonl(tmp_path / "harm.jsonl", [{"prompt": "a box"}])
    for fusion in ("linear", "ties"):
        written = []
        for extent, files in (("none", []), ("text", ["report.json", "report.md"])):
            monkeypatch.setenv("SOMF_REPORT", extent)
            asked = {"safety_eval": str(harm)} if extent == "none" else {}
            recipe = recipe_of(family, mask=str(reported.somf), fusion=fusion, **asked)
            out = tmp_path / f"{fusion}-{extent}"
            merge({**recipe, "dtype": "bfloat16"}, out)
            assert sorted(path.name for path in (out / "somf").glob("report*")) == files
            assert ("## Safety" in (out / "README.md").read_text()) is bool(files)
            written.append((out / "model.safetensors").read_bytes())
        assert written[0] == written[1]


def test_an_unknown_extent_is_refused_before_anything_is_read(
    reported, family, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_REPORT", "much")
    said = tiny.refused(recipe_of(family, mask=str(reported.somf)), tmp_path)
    assert "environment variable SOMF_REPORT: 'much' is not one of" in said


def test_a_work_folder_gets_the_report_and_the_card_no_link(
    reported, family, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOMF_WORK_DIR", str(tmp_path / "work"))
    merge(recipe_of(family, mask=str(reported.somf)), tmp_path / "out")
    assert (tmp_path / "work/report.md").exists()
    assert not (tmp_path / "out/somf").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "## Safety" in card
    assert "report.md" not in card


def test_without_a_model_card_there_is_no_section(reported, family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    recipe = recipe_of(family, mask=str(reported.somf))
    merge(recipe, tmp_path / "out", "--no-write-model-card")
    assert (tmp_path / "out/README.md").read_text() == "mine"
    assert (tmp_path / "out/somf/report.md").exists()


def test_a_merge_in_memory_writes_nothing(reported, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {name: tiny.tensors_of(family / name) for name in ("base", *MODELS)}
    before = sorted(path.name for path in reported.somf.iterdir())
    parameters = {"mask": str(reported.somf), "weight": 0.5}
    merge_state_dicts(models, "somf", base="base", parameters=parameters)
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in reported.somf.iterdir()) == before


def fail(error):
    def failing(*_arguments, **_options):
        raise error

    return failing


def test_parts_that_fail_leave_the_merge_and_the_other_parts(
    reported, family, tmp_path, monkeypatch
):
    shutil.copytree(reported.somf, tmp_path / "mask")
    recipe = recipe_of(family, mask=str(tmp_path / "mask"))
    merge(recipe, tmp_path / "out")
    somf = tmp_path / "out/somf"
    (tmp_path / "mask/training.jsonl").write_text("{")
    (somf / "report.png").mkdir()
    monkeypatch.setattr(TensorRecord, "add", fail(RuntimeError("out of memory")))
    output = merge(recipe, tmp_path / "out")
    lines = [line for line in output.splitlines() if "the merge is written, but" in line]
    failures = [line.split("its report lacks the ")[1] for line in lines]
    assert [failure.split(": ")[0] for failure in failures] == [
        "norms of some task vectors",
        "training curve",
        "plots",
    ]
    assert failures[0].endswith("out of memory")
    assert tiny.tensors_of(tmp_path / "out")
    report = report_of(somf)
    assert report["failures"] == failures
    assert report["task_vectors"]["missing"].endswith("out of memory")
    assert report["mask"]["tensors"] == 20
    assert "Missing from this report" in (somf / "report.md").read_text()
    (somf / "report.png").rmdir()
    (somf / "report.md").unlink()
    (somf / "report.md").mkdir()
    output = merge(recipe, tmp_path / "out")
    assert "its report lacks the text: [Errno 21]" in output
    assert not list(somf.glob("*partial*"))


def test_a_step_of_several_merges_has_its_report(reported, family, tmp_path):
    first = {"name": "safe", **recipe_of(family, mask=str(reported.somf))}
    second = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": 1.0}}
            for name in ("safe", str(family / "base"))
        ],
        "dtype": "float32",
    }
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]))
    options = ("--out-path", tmp_path / "out", "-I", tmp_path / "steps")
    result = tiny.invoke("mergekit-multi", file, *options)
    assert result.exit_code == 0, result.output
    assert report_of(tmp_path / "steps/safe/somf")["mask"]["tensors"] == 20
    assert not (tmp_path / "out/somf").exists()
    assert "## Safety" not in (tmp_path / "out/README.md").read_text()


def group_of(name, base, **models):
    entries = [TensorEntry("base", base, True)]
    entries += [TensorEntry(model, tensor, False) for model, tensor in models.items()]
    return TensorGroup(tuple(entries), TensorMetadata(name=name))


def observed(*groups):
    vectors = TaskVectors()
    for group in groups:
        show_task_vectors(group, {}, vectors.watch(group, {}))
    assert vectors.failure is None
    return vectors


def test_models_that_are_in_some_tensors_alone_have_their_own_norms():
    base = torch.zeros(2)
    one = group_of("a", base, x=torch.tensor([0.0, 2.0]))
    two = group_of("b", base, y=torch.tensor([3.0, 0.0]), x=torch.tensor([1.0, 0.0]))
    vectors = observed(one, two)
    *_, total = vectors.kinds()
    assert vectors.models == ["x", "y"]
    assert total.before.norms == pytest.approx([5**0.5, 3])
    assert total.before.cosine(0, 1) == pytest.approx(3 / (5**0.5 * 3))


def test_a_buffer_of_infinities_has_no_task_vector():
    bases = {"buffer": torch.full((2, 3), float("-inf")), "weight": torch.ones(2, 3)}
    vectors = observed(*(group_of(name, base, x=base + 2) for name, base in bases.items()))
    *_, total = vectors.kinds()
    assert total.before.norms == pytest.approx([24**0.5])
