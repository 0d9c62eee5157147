"""Artifacts that are damaged, swapped or made by strangers are refused before any harm is done."""

import json
import resource
import shutil
import struct

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from somf_mergekit import MaskSet, RecipeError
from somf_mergekit.mask.artifact_files import MASKS_FILE
from somf_mergekit.mask.format import json_with_digest
from somf_mergekit.mask.granularity import Layout
from somf_mergekit.mask.writing import write_masks, write_packed_masks

TENSORS = {"a": torch.rand(5, 3), "b": torch.full((2, 1), 0.5), "s": torch.tensor(0.75)}


def written(folder, probabilities=TENSORS, **provenance):
    return write_masks(
        folder,
        probabilities,
        aliases={"c": "a"},
        provenance={"seed": 4, **provenance},
        history=[{"step": 1}],
        layouts={"b": Layout((2, 1), 0, 4)},
    )


@pytest.fixture
def folder(tmp_path):
    written(tmp_path / "mask")
    return tmp_path / "mask"


def header_of(folder):
    with safe_open(folder / MASKS_FILE, framework="pt") as handle:
        return json.loads(handle.metadata()["somf"])


def with_header(folder, place, text, tensors=None):
    """A masks file on its own with another header."""
    place.mkdir()
    tensors = load_file(folder / MASKS_FILE) if tensors is None else tensors
    save_file(tensors, place / MASKS_FILE, metadata={"somf": text})
    return place


def refusal(folder):
    with pytest.raises(RecipeError) as error:
        MaskSet.open(folder)
    assert str(folder) in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aliases": {"c": "nothing"}}, "'c' isn't a further name of 'nothing' in the file"),
        ({"aliases": {"c": "d", "d": "a"}}, "'c' isn't a further name of 'd'"),
        ({"aliases": {"a": "a"}}, "'a' isn't a further name of 'a' in the file"),
        ({"aliases": {"c\n\x1b[2J": "a"}}, "can't be printed"),
        ({"aliases": {"c": 3}}, "aliases.c: Input should be a valid string"),
        ({"aliases": ["c"]}, "aliases: Input should be a valid dictionary"),
        ({"provenance": "mine"}, "provenance: Input should be a valid dictionary"),
        ({"repeats": {"b": [2, 4]}}, "b of the shape (2, 1) has no axis 2"),
        ({"repeats": {"b": [-1, 4]}}, "repeats.b.0: Input should be greater than or equal to 0"),
        ({"repeats": {"b": [0, 0]}}, "can't be repeated 0 times"),
        ({"repeats": {"b": [0, 10**12]}}, "can't be repeated 1000000000000 times"),
        ({"repeats": {"b": [0, 1.5]}}, "repeats.b.1: Input should be a valid integer"),
        ({"repeats": {"b": [0, True]}}, "repeats.b.1: Input should be a valid integer"),
        ({"repeats": {"b": [0]}}, "repeats.b: List should have at least 2 items"),
        ({"repeats": {"x": [0, 2]}}, "repeats: there is no tensor 'x' in the file"),
        ({"packed": {"a": [10**6, 10**6]}}, "a has (5, 3) bytes for the shape"),
        ({"packed": {"x": [1]}}, "packed: there is no tensor 'x' in the file"),
        ({"products": {"s": [[2, 1], [1, 2]]}}, "products: s of the shape"),
        ({"products": {"s": []}}, "products: s of the shape"),
        ({"products": {"s": [[2, 3], [4, 1]]}}, "products: s of the shape"),
        ({"products": {"x": [[1, 1], [1, 1]]}}, "products: there is no tensor 'x' in the file"),
        ({"models": ["m"]}, "models: 'a' is of none of the 1 models"),
        ({"packed": {"a": [-5, -3]}}, "packed.a.0: Input should be greater than or equal to 0"),
        ({"packed": {"a": [1] * 99, "b": [1], "s": [1]}}, "expected one entry or more on 8 axes"),
        ({"packed": {"a": [9], "b": [1], "s": [1]}}, "a has (5, 3) bytes for the shape (9,)"),
        ({"digests": {"a": "0"}}, "checksums and stored tensors differ in b, s"),
        ({"further": 1}, "further: Extra inputs are not permitted"),
    ],
)
def test_headers_that_say_what_can_not_be(folder, tmp_path, change, said):
    content = json_with_digest({**header_of(folder), **change})
    message = refusal(with_header(folder, tmp_path / "changed", json.dumps(content)))
    assert "its header is damaged" in message
    assert said in message
    assert "learn the mask again" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": NaN}', "isn't a mask of format somf-mask/3 (found None)"),
        ("[" * 100_000, "recursion depth"),
        ('{"format": ' + "9" * 5000 + "}", "integer string conversion"),
        ('{"format": "somf-mask/2"', "Expecting ',' delimiter"),
        ("[]", "its header is damaged (it isn't a JSON object)"),
        ('{"format": ["somf-mask/2"]}', "(found ['somf-mask/2'])"),
        ('{"format": "somf-mask/1"}', "(found 'somf-mask/1')"),
        ('{"format": "somf-mask/2"}', "its checksum differs"),
        (json.dumps(json_with_digest({"format": "somf-mask/2"})), "provenance: Field required"),
    ],
)
def test_headers_that_are_none(folder, tmp_path, text, said):
    assert said in refusal(with_header(folder, tmp_path / "changed", text))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(5, 3)}, "a is stored as F32, expected U8"),
        ({"a": torch.zeros(0, 3, dtype=torch.uint8)}, "a has the shape (0, 3), expected one entry"),
        ({"a": torch.zeros([1] * 9, dtype=torch.uint8)}, "expected one entry or more on 8 axes"),
        ({}, "there is no tensor in the file"),
        ({"a\x1b[2J": torch.zeros(2, dtype=torch.uint8)}, "characters that can't be printed"),
    ],
)
def test_tensors_that_are_no_masks(folder, tmp_path, tensors, said):
    content = {"format": "somf-mask/2", "provenance": {}, "aliases": {}}
    content = json_with_digest(content | {"digests": dict.fromkeys(tensors, "0")})
    message = refusal(with_header(folder, tmp_path / "new", json.dumps(content), tensors))
    assert said in message


def test_a_small_file_that_claims_much_is_refused_without_allocating(tmp_path):
    claimed = {"a": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}
    text = json.dumps(claimed).encode()
    (tmp_path / MASKS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(50))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "can't be read" in refusal(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("packed", [False, True])
def test_every_flipped_bit_of_a_masks_file_is_noticed(folder, tmp_path, packed):
    if packed:
        write_packed_masks(tmp_path / "packed", MaskSet.open(folder))
        folder = tmp_path / "packed"
    original = (folder / MASKS_FILE).read_bytes()
    intact = {name: MaskSet.open(folder).probabilities(name) for name in "abcs"}
    (tmp_path / "alone").mkdir()
    padding = 0
    for place in range(0, len(original)):
        changed = bytearray(original)
        changed[place] ^= 1 << place % 8
        (tmp_path / "alone" / MASKS_FILE).write_bytes(changed)
        try:
            masks = MaskSet.open(tmp_path / "alone")
            found = {name: masks.probabilities(name) for name in "abcs"}
        except RecipeError:
            continue
        # Only blanks between the parts of a file can change without a word.
        padding += 1
        assert all(torch.equal(found[name], intact[name]) for name in intact)
    assert padding < 8


@pytest.mark.parametrize("count", [0, 7, 8, 100, -40, -1])
def test_files_cut_short(folder, count):
    data = (folder / MASKS_FILE).read_bytes()
    (folder / MASKS_FILE).write_bytes(data[:count])
    assert "can't be read" in refusal(folder)


def test_a_damaged_tensor_is_named_when_it_is_read(folder):
    data = bytearray((folder / MASKS_FILE).read_bytes())
    data[-2] ^= 1
    (folder / MASKS_FILE).write_bytes(data)
    masks = MaskSet.open(folder)
    broken = [name for name in masks.stored_names() if not readable(masks, name)]
    assert len(broken) == 1
    with pytest.raises(RecipeError, match=f"tensor {broken[0]} is damaged .its checksum differs"):
        masks.mask(broken[0], "binary")


def readable(masks, name):
    try:
        masks.entries(name)
    except RecipeError:
        return False
    return True


def test_files_of_two_artifacts_do_not_go_together(folder, tmp_path):
    written(tmp_path / "other", seed=5)
    for name in (MASKS_FILE, "somf.json"):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(folder, mixed)
        shutil.copy(tmp_path / "other" / name, mixed / name)
        assert "are not of one artifact: one of them was replaced" in refusal(mixed)
    (folder / "somf.json").unlink()
    assert MaskSet.open(folder).names() == ["a", "b", "c", "s"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xff", "can't decode"),
        (b"[]", "it isn't a JSON object"),
        (b"{}", "its checksum differs"),
        (json.dumps(json_with_digest({"checksums": []})).encode(), "are not of one artifact"),
        (
            b'{"checksums": {"masks.safetensors": "0"}}',
            "its checksum differs from the one recorded in it",
        ),
        (b"[" * 100_000, "recursion depth"),
    ],
)
def test_what_is_reported_beside_a_mask_is_checked(folder, content, said):
    (folder / "somf.json").write_bytes(content)
    assert said in refusal(folder)


def test_every_flipped_bit_of_what_is_reported_is_noticed(folder):
    original = (folder / "somf.json").read_bytes()
    reported = json.loads(original)
    for place in range(len(original)):
        changed = bytearray(original)
        changed[place] ^= 1 << place % 7
        (folder / "somf.json").write_bytes(changed)
        try:
            MaskSet.open(folder)
        except RecipeError:
            continue
        assert json.loads(changed) == reported


def test_a_merge_says_which_tensor_of_its_mask_is_damaged(tmp_path, family, family_recipe):
    learned = tiny.write_recipe(tmp_path / "first.yml", family_recipe(max_steps=0))
    assert tiny.invoke("mergekit-somf", "learn", learned, tmp_path / "mask").exit_code == 0
    data = bytearray((tmp_path / "mask" / MASKS_FILE).read_bytes())
    data[-100] ^= 16
    (tmp_path / "mask" / MASKS_FILE).write_bytes(data)
    given = family_recipe(safety_dataset=None, mask=str(tmp_path / "mask"))
    file = tiny.write_recipe(tmp_path / "second.yml", given)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "is damaged (its checksum differs from the one recorded)" in result.output
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path):
    masks = written(tmp_path / "mask", loss=float("nan"), rates=[1.0, float("inf")])
    assert masks.provenance == {"seed": 4, "loss": None, "rates": [1.0, None]}


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "..", "a\\b", "model..weight"])
def test_names_that_are_paths_are_refused(tmp_path, name):
    for masks, aliases in (({name: torch.rand(3)}, {}), ({"a": torch.rand(3)}, {name: "a"})):
        with pytest.raises(RecipeError, match="is a path"):
            write_masks(tmp_path / "mask", masks, aliases=aliases, provenance={}, history=[])
    assert not list(tmp_path.iterdir())
