"""What learning sees is what is written: tokens, embeddings, ties and draws."""

import json

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from somf_mergekit import MaskSet
from somf_mergekit.evaluate.likelihood import preference_margins
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.prepass.ties import ties_embeddings
from somf_mergekit.recipe.validate import read_recipe

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", tiny.preference_rows(40))


@pytest.fixture
def settings(pairs, monkeypatch):
    monkeypatch.setenv("SOMF_PRECISION", "float32")
    return {
        "safety_dataset": str(pairs),
        "held_out_share": 0.3,
        "max_steps": 2,
        "learning_rate": 1.0,
        "batch_size": 4,
        "max_length": 64,
    }


def assert_learned_is_written(content, out):
    """Compare the margins that learning recorded with those of the written model."""
    reported = json.loads((out / "somf/somf.json").read_text())["held_out"]
    data = checked_data(planned_merge(read_recipe(content), MergeOptions()))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    margins = preference_margins(model, data.held_out, batch_size=8)
    assert reported["merge"]["margin"] == pytest.approx(
        sum(margins) / len(margins), rel=1e-4, abs=1e-5
    )
    assert abs(reported["merge"]["margin"] - reported["plain_fusion"]["margin"]) > 1e-3


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A base that knows few words, and two models with more of them, and special tokens."""
    root = tmp_path_factory.mktemp("vocabularies")
    for seed, (name, words, extra) in enumerate(
        [
            ("base", tiny.WORDS[:4], ()),
            ("math", tiny.WORDS[:12], ("<x>",)),
            ("code", tiny.WORDS, ("<y>", "<x>")),
        ]
    ):
        tokenizer = tiny.tiny_tokenizer(words=words, extra_tokens=extra)
        tiny.save_model(tiny.tiny_llama(seed, len(tokenizer)), tokenizer, root / name)
    return root


def test_a_union_of_vocabularies_is_numbered_once_and_for_all(vocabularies, settings, tmp_path):
    folders = [vocabularies / name for name in ("base", "math", "code")]
    settings["granularity"] = "row"
    content = tiny.recipe(folders[0], folders[1:], weights=[0.4, 0.3], **settings)
    content["tokenizer"] = {"source": "union", "pad_to_multiple_of": 8}
    found = tiny.merged(content, tmp_path / "one")
    assert_learned_is_written(content, tmp_path / "one")
    again = tiny.merged(content, tmp_path / "two")
    assert all(torch.equal(found[name], again[name]) for name in found)
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert one.get_vocab() == two.get_vocab()
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()

    # The base's tokens keep their numbers; others follow in the order of their numbers elsewhere.
    numbers = one.get_vocab()
    owns = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    further = numbers.keys() - owns[0].keys()
    place = {t: (min(own[t] for own in owns if t in own), t) for t in numbers}
    expected = [*sorted(owns[0], key=owns[0].get), *sorted(further, key=place.get)]
    assert sorted(numbers, key=numbers.get) == expected
    assert len(further) > 10

    # Each token's row is what its own rows and its own entry of the mask make of it.
    mask = MaskSet.open(tmp_path / "one").probabilities(EMBEDDINGS)
    mask = mask / mask.mean()
    stored = [tiny.tensors_of(folder)[EMBEDDINGS] for folder in folders]
    for token, number in numbers.items():
        rows = [
            t[own[token]] if token in own else None for t, own in zip(stored, owns, strict=True)
        ]
        given = [row for row in rows if row is not None]
        start = rows[0] if rows[0] is not None else sum(given) / len(given)
        changes = [
            weight * ((start if row is None else row) - start)
            for weight, row in zip((0.4, 0.3), rows[1:], strict=True)
        ]
        torch.testing.assert_close(
            found[EMBEDDINGS][number], start + sum(changes) * mask[number], rtol=1e-4, atol=1e-5
        )

    # A mask given is used as one that was learned, also where its granularity is named.
    content["parameters"] = {"mask": str(tmp_path / "one"), "granularity": "row"}
    given = tiny.merged(content, tmp_path / "given")
    assert all(torch.equal(found[name], given[name]) for name in found)


def stored(folder, changes=(), **config):
    """Change what a saved model stores: tensors by name (None takes one out), and its config."""
    tensors = {**tiny.tensors_of(folder), **dict(changes)}
    save_file(
        {k: v.clone() for k, v in tensors.items() if v is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def tied_family(root, kind="Llama", head="both"):
    """A base with tied embeddings and a specialist of it, which store them under these names."""
    tokenizer = tiny.tiny_tokenizer()
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=True)
    )
    for seed, name in enumerate(("base", "math")):
        tiny.save_model(tiny.perturbed(base, seed) if seed else base, tokenizer, root / name)
        weight = tiny.tensors_of(root / name)[EMBEDDINGS]
        if head != "none":
            stored(root / name, {HEAD: weight, EMBEDDINGS: weight if head == "both" else None})
    return root / "base", root / "math"


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}


SAMPLED = {"mask_kind": "sampled"}
DROPPED = {"fusion": "dare_linear", "density": 0.5}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("Llama", SAMPLED),
        ("Llama", DROPPED),
        ("Llama", {**DROPPED, "exclude": EMBEDDINGS}),
        # mergekit infers the architecture of this one.
        ("SmolLM3", SAMPLED),
    ],
    ids=["sampled", "dare", "dare without a mask", "inferred"],
)
def test_tied_weights_that_are_stored_twice_are_drawn_once(kind, how, settings, tmp_path, caplog):
    base, math = tied_family(tmp_path, kind)
    content = tiny.recipe(base, [math], weights=[0.7], **settings, **how)
    found = tiny.merged(content, tmp_path / "out")
    assert "duplicated tensors" not in caplog.text
    assert torch.equal(found[EMBEDDINGS], found[HEAD])
    assert not torch.equal(found[HEAD], tiny.tensors_of(base)[HEAD])
    assert_learned_is_written(content, tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    assert (HEAD in masks) == (EMBEDDINGS in masks) == ("exclude" not in how)
    # What merges state dicts has the names alone.
    if "mask_kind" in how:
        one, other = (masks.mask(name, "sampled", seed=3) for name in (EMBEDDINGS, HEAD))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "written"),
    # Of an architecture that it infers, mergekit writes what all models store.
    [("Llama", {HEAD, EMBEDDINGS}), ("SmolLM3", {HEAD})],
)
def test_tied_weights_may_be_stored_as_the_head_alone(kind, written, settings, tmp_path):
    base, math = tied_family(tmp_path, kind, head="alone")
    content = tiny.recipe(base, [math], weights=[0.7], **settings)
    found = tiny.merged(content, tmp_path / "out")
    assert found.keys() & {HEAD, EMBEDDINGS} == written
    assert_learned_is_written(content, tmp_path / "out")
    mask = MaskSet.open(tmp_path / "out").probabilities(HEAD)
    start, trained = (tiny.tensors_of(folder)[HEAD] for folder in (base, math))
    expected = start + 0.7 * (trained - start) * mask / mask.mean()
    for name in written:
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_parameters_that_part_tied_weights_are_refused(settings, tmp_path):
    base, math = tied_family(tmp_path)
    content = tiny.recipe(base, [math], **settings)
    content["models"][0]["parameters"]["weight"] = [
        {"filter": "lm_head", "value": 0.2},
        {"value": 0.5},
    ]
    reported = tiny.refused(content, tmp_path)
    assert all(words in reported for words in (EMBEDDINGS, HEAD, "different parameters"))


@pytest.mark.parametrize("kind", ["Llama", "SmolLM3"])
@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_of_its_own_unties_the_merge(kind, says_tied, settings, tmp_path):
    content, found = [], []
    for is_tied in (True, False):
        base, math = tied_family(tmp_path / f"{is_tied}", kind, head="none")
        start, embeddings = (tiny.tensors_of(folder)[EMBEDDINGS] for folder in (base, math))
        head = embeddings + 0.05 * torch.randn(
            embeddings.shape, generator=torch.Generator().manual_seed(3)
        )
        stored(math, {HEAD: head}, tie_word_embeddings=says_tied)
        if not is_tied:
            stored(base, {HEAD: start}, tie_word_embeddings=False)
        content.append(tiny.recipe(base, [math], weights=[0.7], **settings))
        found.append(tiny.merged(content[-1], tmp_path / f"{is_tied}/out"))
    out = tmp_path / "True/out"
    masks = MaskSet.open(out)
    for name, trained in ((EMBEDDINGS, embeddings), (HEAD, head)):
        mask = masks.probabilities(name)
        expected = start + 0.7 * (trained - start) * mask / mask.mean()
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_learned_is_written(content[0], out)
    # A base that was untied before gives the same.
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("Qwen3_5ForConditionalGeneration", "outer"), ("Qwen3_5ForCausalLM", "text_config")],
)
def test_the_class_of_a_model_says_which_part_of_its_configuration_ties(kind, counts):
    config = transformers.Qwen3_5Config(
        tie_word_embeddings=counts == "outer",
        text_config={"tie_word_embeddings": counts == "text_config", "num_hidden_layers": 1},
        vision_config={"depth": 1},
        architectures=[kind],
    )
    assert ties_embeddings(config, MergeOptions())
    config.tie_word_embeddings, text = not config.tie_word_embeddings, config.get_text_config()
    text.tie_word_embeddings = not text.tie_word_embeddings
    assert not ties_embeddings(config, MergeOptions())
