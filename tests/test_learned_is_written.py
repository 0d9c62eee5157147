"""What learning sees is what is written: tokens, embeddings, ties and draws."""

import json

import pytest
import tiny
import torch
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from somf_mergekit import MaskSet
from somf_mergekit.evaluate.likelihood import preference_margins
from somf_mergekit.inputs import checked_data
from somf_mergekit.planner import planned_merge
from somf_mergekit.recipe_check import read_recipe

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
    """Compare the margins that learning told of with those of the written model."""
    told = json.loads((out / "somf/somf.json").read_text())["held_out"]
    data = checked_data(planned_merge(read_recipe(content), MergeOptions()))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    margins = preference_margins(model, data.held_out, batch_size=8)
    assert told["merge"]["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4, abs=1e-5)
    assert abs(told["merge"]["margin"] - told["plain_fusion"]["margin"]) > 1e-3


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
