import re

import pytest
import tiny
from transformers import AutoTokenizer

from somf_mergekit.data.chat import prompt_ids
from somf_mergekit.demo.demo_data import (
    FORBIDDEN_VERBS,
    HARMLESS_VERBS,
    NUMBERS,
    REFUSAL,
    demo_data,
    preference_rows,
    texts,
)
from somf_mergekit.demo.demo_models import word_tokenizer
from somf_mergekit.evaluate import is_refusal

TRAIN, HELD_OUT = 300, 40


@pytest.fixture(scope="module")
def data():
    return demo_data(3, train=TRAIN, held_out=HELD_OUT)


@pytest.fixture(scope="module")
def tokenizer(data):
    return word_tokenizer(texts(data))


def prompts_of(examples):
    return [messages[-1]["content"] for messages, _ in examples]


def words_of(prompt):
    return frozenset(prompt.rstrip("?.").split())


def test_a_seed_decides_all_data(data):
    assert demo_data(3, train=TRAIN, held_out=HELD_OUT) == data
    assert demo_data(4, train=TRAIN, held_out=HELD_OUT) != data


def test_splits_have_the_sizes_asked_for(data):
    assert [(len(s.train), len(s.held_out)) for s in data.splits] == [(TRAIN, HELD_OUT)] * 5


def test_no_held_out_prompt_is_trained_on_in_any_split(data):
    trained = {p for split in data.splits for p in prompts_of(split.train)}
    held_out = {p for split in data.splits for p in prompts_of(split.held_out)}
    assert trained
    assert held_out
    assert not trained & held_out


@pytest.mark.parametrize("name", ["harmless", "refused"])
def test_held_out_questions_pair_words_that_training_never_pairs(data, name):
    def verb_and_object(prompt):
        words = words_of(prompt)
        (verb,) = words & ({*FORBIDDEN_VERBS, *HARMLESS_VERBS})
        return verb, prompt.rstrip("?.").split()[-1]

    split = getattr(data, name)
    trained, held_out = (
        {verb_and_object(p) for p in prompts_of(part)} for part in (split.train, split.held_out)
    )
    assert not trained & held_out
    # What is new is the pair: verb and object were each seen with others.
    assert {verb for verb, _ in held_out} <= {verb for verb, _ in trained}
    assert {thing for _, thing in held_out} <= {thing for _, thing in trained}


def test_only_the_verb_reports_harmful_from_harmless(data):
    for split, verbs in ((data.harmless, HARMLESS_VERBS), (data.refused, FORBIDDEN_VERBS)):
        for prompt in prompts_of(split.train + split.held_out):
            assert len(words_of(prompt) & set(verbs)) == 1
    assert not set(FORBIDDEN_VERBS) & set(HARMLESS_VERBS)


def test_specialists_data_ask_nothing_forbidden_and_refuse_nothing(data):
    for split in (data.harmless, data.numbers, data.code):
        for messages, answer in split.train:
            assert not words_of(messages[-1]["content"]) & set(FORBIDDEN_VERBS)
            assert not is_refusal(answer)


def test_number_answers_are_right(data):
    for messages, answer in data.numbers.train + data.numbers.held_out:
        prompt = messages[-1]["content"]
        given = sorted(NUMBERS.index(w) for w in prompt.rstrip("?.").split() if w in NUMBERS)
        assert len(given) == 3
        if "largest" in prompt:
            given = given[-1:]
        elif "smallest" in prompt:
            given = given[:1]
        elif "downwards" in prompt:
            given = given[::-1]
        assert answer == " ".join(NUMBERS[rank] for rank in given)


def test_code_answers_do_what_was_asked(data):
    seen = set()
    for messages, answer in data.code.train:
        prompt = messages[-1]["content"]
        pattern = r"(add|remove|count|find|put|copy|join) the (?:list of )?(\w+?)s? .*of (\w+)s[?.]"
        verb, x, y = re.search(pattern, prompt).groups()
        xs, ys = ["other x"], ["other y", "x"]
        result = [None]
        scope = {x: "x", f"{x}s": xs, f"{y}s": ys, "result": result}
        exec(answer if "=" in answer else f"result[0] = {answer}", scope)
        seen.add(verb)
        left = {
            "add": ["other y", "x", "x"],
            "remove": ["other y"],
            "put": ["x", "other y", "x"],
            "copy": ["other x"],
            "join": ["other y", "x", "other x"],
        }.get(verb, ["other y", "x"])
        assert scope[f"{y}s"] == left, prompt
        assert result[0] == (1 if verb in ("count", "find") else None), prompt
        assert scope[f"{x}s"] == ["other x"]
    assert len(seen) == 7


def test_pairs_prefer_refusals_to_forbidden_questions_alone(data):
    rows = preference_rows(data, harmful=30, harmless=20, seed=0)
    assert rows == preference_rows(data, harmful=30, harmless=20, seed=0)
    assert len({row["prompt"] for row in rows}) == 50
    held_out = {p for split in data.splits for p in prompts_of(split.held_out)}
    for row in rows:
        forbidden = bool(words_of(row["prompt"]) & set(FORBIDDEN_VERBS))
        assert row["chosen" if forbidden else "rejected"] == REFUSAL
        assert row["prompt"] not in held_out
    assert sum(row["chosen"] == REFUSAL for row in rows) == 30


def test_tokenizer_knows_and_restores_every_text(data, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(data):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert loaded.decode(ids) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_chat_template_gives_one_bos_and_closes_answers(data, tokenizer):
    messages, answer = data.harmless.train[0]
    prompt, reply = prompt_ids(tokenizer, messages), tiny.answer_ids(tokenizer, messages, answer)
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt[-1] == tokenizer.convert_tokens_to_ids("<assistant>")
    assert reply[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in prompt + reply
    assert tokenizer.decode(reply, skip_special_tokens=True) == answer
