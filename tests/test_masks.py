import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.mask.artifact_files import MASKS_FILE
from somf_mergekit.mask.format import decoded_probability, encoded_probability, json_with_digest
from somf_mergekit.mask.granularity import Layout
from somf_mergekit.mask.writing import write_masks, write_packed_masks


@pytest.fixture
def artifact(tmp_path):
    probabilities = {"a": torch.rand(5, 3), "b": torch.full((2, 1), 0.5)}
    masks = write_masks(
        tmp_path / "artifact",
        probabilities,
        aliases={"c": "a"},
        provenance={"seed": 4},
        history=[{"step": 1}],
    )
    return tmp_path / "artifact", probabilities, masks


def test_storage_error_and_threshold():
    p = torch.cat([torch.linspace(0, 1, 100_001), torch.tensor([0.5]).nextafter(torch.tensor(1.0))])
    codes = encoded_probability(p)
    assert codes.dtype == torch.uint8
    assert (decoded_probability(codes) - p).abs().max() <= 1 / 512 + 1e-7
    assert torch.equal(decoded_probability(codes) > 0.5, p > 0.5)


def test_artifact_round_trip(artifact):
    folder, probabilities, masks = artifact
    assert sorted(file.name for file in folder.iterdir()) == [
        MASKS_FILE,
        "somf.json",
        "training.jsonl",
    ]
    assert (folder / MASKS_FILE).stat().st_size < 17 + 1200
    reported = json.loads((folder / "somf.json").read_text())
    assert sorted(reported.pop("checksums")) == [MASKS_FILE, "training.jsonl"]
    assert len(reported.pop("digest")) == 64
    assert reported == {"seed": 4} == masks.provenance
    assert masks.names() == ["a", "b", "c"]
    assert "c" in masks
    assert "d" not in masks
    for name, stored in (("a", "a"), ("b", "b"), ("c", "a")):
        found = masks.probabilities(name)
        assert found.dtype == torch.float32
        assert masks.shape(name) == tuple(found.shape) == tuple(probabilities[stored].shape)
        assert (found - probabilities[stored]).abs().max() < 1 / 400
    assert masks.mask("b", "binary").tolist() == [[0], [0]]
    with pytest.raises(KeyError, match="no mask for d"):
        masks.probabilities("d")


@pytest.mark.parametrize("shape", [(5, 3), (8,), (1, 1), (3, 4, 5)])
def test_packed_masks_are_the_binary_ones_in_a_bit_an_entry(tmp_path, shape):
    probabilities = {"a": torch.rand(shape), "b": torch.full((2, 1), 0.5)}
    layouts = {"b": Layout((2, 1), 0, 4)}
    masks = write_masks(
        tmp_path / "soft",
        probabilities,
        aliases={"c": "a"},
        provenance={"seed": 4},
        history=[{"step": 1}],
        layouts=layouts,
    )
    packed = write_packed_masks(tmp_path / "packed", masks)
    assert packed.provenance == masks.provenance
    assert packed.names() == masks.names()
    assert load_file(packed.path)["a"].numel() == -(-probabilities["a"].numel() // 8)
    for name in masks.names():
        assert packed.layout(name) == masks.layout(name)
        for kind in ("soft", "binary"):
            assert torch.equal(packed.mask(name, kind), masks.mask(name, "binary"))
    again = write_packed_masks(tmp_path / "again", packed)
    files = [tmp_path / name / MASKS_FILE for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again.names() == masks.names()


def test_a_packed_mask_of_another_length_than_its_shape_is_damaged(tmp_path, artifact):
    packed = write_packed_masks(tmp_path / "packed", artifact[2])
    header = packed.header.model_dump()
    header["packed"]["a"] = [500, 3]
    header = json_with_digest(header)
    save_file(load_file(packed.path), tmp_path / MASKS_FILE, metadata={"somf": json.dumps(header)})
    with pytest.raises(RecipeError, match=r"header is damaged .*2,.* bytes for the shape"):
        MaskSet.open(tmp_path / MASKS_FILE)


def test_artifact_opens_by_file_by_folder_and_by_the_merge_around_it(artifact, tmp_path):
    folder, _, _ = artifact
    (tmp_path / "out").mkdir()
    folder.rename(tmp_path / "out" / "somf")
    for source in ("out", "out/somf", f"out/somf/{MASKS_FILE}"):
        assert MaskSet.open(tmp_path / source).names() == ["a", "b", "c"]


def test_what_is_no_mask_is_refused(artifact, tmp_path):
    folder, _, _ = artifact
    with pytest.raises(RecipeError, match="no such mask"):
        MaskSet.open(tmp_path / "nothing")
    tensors = load_file(folder / MASKS_FILE)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="isn't a mask of format"):
        MaskSet.open(tmp_path / "other.safetensors")
    data = (folder / MASKS_FILE).read_bytes()
    (folder / MASKS_FILE).write_bytes(data[: len(data) - 3])
    with pytest.raises(RecipeError, match="can't be read"):
        MaskSet.open(folder)
