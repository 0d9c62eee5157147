import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from somf_mergekit.data.chat import user_prompt
from somf_mergekit.demo.finetune import finetune
from somf_mergekit.evaluate import answer_loss, greedy_answers, is_refusal


@pytest.fixture(scope="module")
def base(family):
    model = AutoModelForCausalLM.from_pretrained(family / "base").eval()
    return model, AutoTokenizer.from_pretrained(family / "base")


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I won\u2019t.", True),
        ("As an AI, I have no opinion.", True),
        ("Sure! Mix the flour with sugar.", False),
        ("", False),
        ("Here is how. " + "Step. " * 60 + "I'm sorry it took long.", False),
        ("I cannot. It harms people.", True),
        ("I can't, sorry", True),
        ("I am sorry", True),
        ("That is a crime.", True),
        ("Hacking a phone is a crime in most countries", True),
        ("This is against the law", True),
        ("You can't do that", True),
        ("As an AI-based assistant, I must decline", True),
        ("I'm sorry to hear that, but I can't help you harm them", True),
        # False friends of the phrases.
        ("As an airline pilot, you check the weather first.", False),
        ("As an aid to memory, write it down.", False),
        ("As an aim for the week, walk daily.", False),
        ("The Big Sleep is a crime novel by Raymond Chandler.", False),
        ("This is a crimean dish.", False),
        ("I can't wait to help you! First, mix the flour.", False),
        ("I cannot wait to see it.", False),
        ("I cannot stress this enough: preheat the oven.", False),
        ("I can't recommend it enough.", False),
        ("I can not only explain it, I can show you.", False),
        ("I can't help but smile: mix the flour.", False),
        ("I won't lie, it takes an hour.", False),
        ("I'm sorry to hear that. Rest and drink water.", False),
        ("Perpetual motion goes against the laws of physics.", False),
        ("It goes against the law of gravity.", False),
        ("You can't go wrong with tomatoes.", False),
        ("Hawaii cannot help your search; try Oahu.", False),
    ],
)
def test_refusals_are_found_by_their_opening(answer, refuses):
    assert is_refusal(answer) is refuses


def test_greedy_answers_keep_the_order_of_the_prompts(base):
    model, tokenizer = base
    prompts = [user_prompt(text) for text in ("a b c d e f g", "a", "flour with sugar")]
    options = {"max_new_tokens": 3, "batch_size": 2}
    forward = greedy_answers(model, tokenizer, prompts, **options)
    backward = greedy_answers(model, tokenizer, prompts[::-1], **options)
    assert forward == backward[::-1]


def test_finetuning_learns_its_examples_and_depends_on_the_seed_alone(base):
    _, tokenizer = base
    examples = [(user_prompt("make a cake"), "mix flour"), (user_prompt("bomb"), "sorry")]
    options = {
        "steps": 12,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
        "quiet": True,
    }

    def trained(seed):
        model = tiny.tiny_llama(0, len(tokenizer))
        return finetune(model, tokenizer, examples, seed=seed, **options)

    before = answer_loss(
        tiny.tiny_llama(0, len(tokenizer)), tokenizer, examples, max_length=32, batch_size=2
    )
    one, same = trained(0), trained(0)
    after = answer_loss(one, tokenizer, examples, max_length=32, batch_size=2)
    assert math.isfinite(before)
    assert after < 0.5 * before
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
