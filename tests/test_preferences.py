import random
import tracemalloc

import datasets
import pytest
import tiny

from somf_mergekit import RecipeError
from somf_mergekit.data import encoding
from somf_mergekit.data import pairs as prefs
from somf_mergekit.data.chat import check_words, prompt_ids, user_prompt
from somf_mergekit.data.dataset_reading import dataset_rows
from somf_mergekit.data.rows import Rows
from somf_mergekit.prepass.learning_data import preference_data
from somf_mergekit.recipe.settings import Settings


def message(role, content):
    return {"role": role, "content": content}


ROW = {"prompt": "how?", "chosen": "no", "rejected": "so"}
EXPECTED = prefs.Pair((("user", "how?"),), "no", "so")


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {
            "prompt": [message("user", "how?")],
            "chosen": [message("assistant", "no")],
            "rejected": [message("assistant", "so")],
        },
        {
            "chosen": [message("user", "how?"), message("assistant", "no")],
            "rejected": [message("user", "how?"), message("assistant", "so")],
        },
        {
            "chosen": "\n\nHuman: how?\n\nAssistant: no",
            "rejected": "\n\nHuman: how?\n\nAssistant: so",
        },
        {
            "prompt": "how?",
            "response_0": "so",
            "response_1": "no",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
        },
    ],
    ids=["text", "messages", "dialogues", "hh-rlhf", "pku"],
)
def test_every_known_format_gives_the_same_pair(row):
    pairs = prefs.preference_pairs(tiny.dataset(row), "data")
    assert list(pairs) == [EXPECTED]
    assert pairs.notes("data") == []


def test_dialogue_of_several_turns_keeps_its_beginning():
    beginning = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant: "
    (pair,) = prefs.preference_pairs(
        tiny.dataset({"chosen": beginning + "no", "rejected": beginning + "so"}), "data"
    )
    assert [role for role, _ in pair.prompt] == ["user", "assistant", "user"]
    assert (pair.chosen, pair.rejected) == ("no", "so")


def test_unusable_rows_are_dropped_and_counted():
    safe = {"prompt": "p", "response_0": "a", "response_1": "b"}
    pairs = prefs.preference_pairs(
        tiny.dataset(
            {**safe, "is_response_0_safe": True, "is_response_1_safe": True},
            {**safe, "is_response_0_safe": False, "is_response_1_safe": False},
            {**safe, "is_response_0_safe": True, "is_response_1_safe": False},
        ),
        "data",
    )
    assert len(pairs) == 1
    assert pairs.left_out.reasons == {"without exactly one safe answer": 2}

    pairs = prefs.preference_pairs(
        tiny.dataset(
            ROW, {**ROW, "chosen": " "}, {**ROW, "rejected": "no"}, {**ROW, "prompt": None}
        ),
        "data",
    )
    assert len(pairs) == 1
    assert pairs.left_out.reasons == {
        "without a prompt": 1,
        "with chosen equal to rejected": 1,
        "without an answer": 1,
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "b"}, "Found: question, answer"),
        ({**ROW, "rejected": "no"}, "1 with chosen equal to rejected"),
        ({**ROW, "chosen": ""}, "1 without an answer"),
    ],
)
def test_data_without_a_usable_pair_is_refused(row, said):
    with pytest.raises(RecipeError, match=said):
        prefs.preference_pairs(tiny.dataset(row), "data")


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_files_and_folders_are_read(tmp_path, extension):
    data = datasets.Dataset.from_list([ROW, {**ROW, "prompt": "and?"}])
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"train.{extension}"
    {
        "jsonl": data.to_json,
        "json": data.to_json,
        "csv": data.to_csv,
        "parquet": data.to_parquet,
    }[extension](str(path))
    for source in (path, folder):
        assert [row["prompt"] for row in dataset_rows(str(source))] == ["how?", "and?"]


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "saved"))
    assert [row["chosen"] for row in dataset_rows(str(tmp_path / "saved"))] == ["no"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such file"),
        ("data.txt", "x", "unknown kind .txt"),
        ("data.jsonl", "{broken", "can't be read"),
    ],
)
def test_unreadable_data_is_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=said):
        dataset_rows(str(tmp_path / name))


def test_hub_id_that_can_not_be_had_is_refused():
    with pytest.raises(RecipeError, match="nobody/nothing"):
        dataset_rows("nobody/nothing")


def test_sampled_pairs_depend_on_the_seed_alone():
    pairs = prefs.preference_pairs(
        tiny.dataset(*({**ROW, "prompt": str(i)} for i in range(50))), "data"
    )
    assert list(pairs.sampled(10, 1)) == list(pairs.sampled(None, 1)[:10])
    assert list(pairs.sampled(10, 1)) != list(pairs.sampled(10, 2))
    assert len(pairs.sampled(None, 0)) == 50
    order = list(pairs)
    random.Random(1).shuffle(order)
    assert list(pairs.sampled(None, 1)) == order


class Counting:
    """A tokenizer that says how often it was asked."""

    def __init__(self, tokenizer):
        self._tokenizer, self.asked = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments, **keywords):
        self.asked += 1
        return self._tokenizer(*arguments, **keywords)


@pytest.mark.slow
def test_of_many_rows_no_more_are_stored_or_tokenised_than_are_used():
    count, long = 20_000, "no " * 100
    text = {"prompt": [f"how {i}?" for i in range(count)], "chosen": [long] * count}
    many = datasets.Dataset.from_dict({**text, "rejected": ["so"] * count})
    settings = Settings(safety_dataset="data", max_steps=2, batch_size=3, held_out_share=0.5)
    tokenizer = Counting(tiny.tiny_tokenizer())
    tracemalloc.start()
    try:
        pairs = prefs.preference_pairs(Rows(many, many.column_names), "data")
        data = preference_data(pairs, "data", tokenizer, settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Two hundred are drawn for the hundred that are held out of them.
    assert len(data.held_out) == 100
    assert len(data.pairs) == 2 * 3 + 100
    assert tokenizer.asked < 5 * 206
    # All answers would take 300 bytes a row and more.
    assert peak < 100 * count
    order = list(range(count))
    random.Random(0).shuffle(order)
    assert [pair.row for pair in data.pairs] == order[:106]
    assert [pair.row for pair in data.held_out] == order[106:206]


def test_chat_template_is_used_without_a_second_bos():
    tokenizer = tiny.tiny_tokenizer()
    ids = prompt_ids(tokenizer, user_prompt("make a cake"))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == "<s><|user|> make a cake\n<|assistant|> "
    answer = tiny.answer_ids(tokenizer, user_prompt("make a cake"), "sorry")
    assert tokenizer.decode(answer) == "sorry</s>"
    whole = tokenizer.apply_chat_template(
        [message("user", "make a cake"), message("assistant", "sorry")], tokenize=False
    )
    assert tokenizer.decode(ids + answer) == whole.rstrip()


def test_plain_format_where_there_is_no_template():
    tokenizer = tiny.tiny_tokenizer(chat_template=None)
    ids = prompt_ids(tokenizer, user_prompt("make a cake"))
    assert tokenizer.decode(ids) == "User: make a cake\n\nAssistant:"
    answer = tiny.answer_ids(tokenizer, user_prompt("make a cake"), "sorry")
    assert tokenizer.decode(answer) == " sorry</s>"
    assert tiny.answer_ids(tokenizer, user_prompt("make a cake"), "  ") == []


def test_plain_format_begins_with_bos_where_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = prompt_ids(tokenizer, user_prompt("make"))
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_pairs_that_are_equal_after_cutting_are_dropped():
    tokenizer = tiny.tiny_tokenizer()
    long = "make a cake with flour " * 8
    pairs = [
        prefs.Pair((("user", "how"),), long + "safe", long + "bomb"),
        prefs.Pair((("user", "how"),), "sorry", "mix"),
    ]
    found, dropped = encoding.encoded_pairs(pairs, tokenizer, 24, "data")
    assert len(found) == 1
    assert dropped.reasons == {"with equal answers in the first 24 tokens": 1}
    with pytest.raises(RecipeError, match="raise max_length"):
        encoding.encoded_pairs(pairs[:1], tokenizer, 24, "data")


def test_a_template_that_refuses_the_roles_is_named():
    tokenizer = tiny.tiny_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(RecipeError, match="no system role"):
        prompt_ids(tokenizer, user_prompt("hi"))


def test_a_tokenizer_that_is_made_of_nothing_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    whole = tiny.tiny_tokenizer()
    check_words(whole)
    bare = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    empty = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="knows no words"):
        check_words(empty)


def test_code_that_comes_with_a_dataset_is_never_asked_about(monkeypatch):
    asked = []

    def builder(source, **given):
        asked.append(given)
        raise ValueError("no")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    # As before datasets 4.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    with pytest.raises(RecipeError, match="can't be read: no"):
        dataset_rows("nobody/nothing")
    assert asked == [{"name": None, "trust_remote_code": False}]
    assert datasets.config.HF_DATASETS_TRUST_REMOTE_CODE is True
