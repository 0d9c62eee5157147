"""What is learned from and measured on: the tokens that a rendered conversation has."""

import datetime

import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from somf_mergekit.data.chat import encoded, prompt_ids, user_prompt
from somf_mergekit.data.rendering import Rendering, opening

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "blank": tiny.CHAT_TEMPLATE,
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "plain": None,
}
QUESTION, ANSWER = "make a cake", "the powder"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def sentencepiece(scheme, template=None):
    """A tokenizer of the kind that puts a blank in front of a text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "prepend":
        blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        bpe.normalizer = normalizers.Sequence(blanks)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(tiny.WORDS), "user assistant INST"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(template):
    return tiny.tiny_tokenizer(template, ("<|im_start|>", "<|im_end|>"))


def whole_text(tokenizer):
    """The finished conversation, as the template or the plain format has it."""
    if not tokenizer.chat_template:
        return f"User: {QUESTION}\n\nAssistant: {ANSWER}"
    talk = [*user_prompt(QUESTION), {"role": "assistant", "content": ANSWER}]
    return tokenizer.apply_chat_template(talk, tokenize=False).rstrip()


# Where a token stands across the border, the prompt's own tokens go first, as in generation.
@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "blank"])
def test_an_answer_has_the_tokens_of_the_rendered_conversation(scheme, name):
    tokenizer = sentencepiece(scheme, TEMPLATES[name])
    whole = tokenizer(whole_text(tokenizer), add_special_tokens=False)["input_ids"]
    ids = prompt_ids(tokenizer, user_prompt(QUESTION))
    marked = name not in ("no end", "plain")
    assert ids + tiny.answer_ids(tokenizer, user_prompt(QUESTION), ANSWER) == [
        *whole,
        *[tokenizer.eos_token_id] * (not marked),
    ]
    # Likewise where one of several answers is longer, and none is to end.
    found = encoded(tokenizer, user_prompt(QUESTION), [ANSWER, f"{ANSWER} bomb"], 200)
    assert found.prompt + found.answers[0] == whole + [2] * (not marked)


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_an_answer_goes_on_after_a_blank_that_ends_the_prompt(scheme):
    tokenizer = sentencepiece(scheme, tiny.CHAT_TEMPLATE)
    ids = tiny.answer_ids(tokenizer, user_prompt(QUESTION), ANSWER)
    assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("t")


@pytest.mark.parametrize("name", TEMPLATES)
def test_byte_level_tokens_are_those_of_prompt_and_answer_apart(name):
    tokenizer = byte_level(TEMPLATES[name])
    ids = prompt_ids(tokenizer, user_prompt(QUESTION))
    rest = whole_text(tokenizer)[len(tokenizer.decode(ids)) :]
    apart = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if name in ("no end", "plain"):
        apart.append(tokenizer.eos_token_id)
    assert tiny.answer_ids(tokenizer, user_prompt(QUESTION), ANSWER) == apart


def thinking(finished, closes=""):
    """A template whose generation prompt opens a thought, unless a keyword closes it."""
    ends = (
        "{% if " + closes + " is defined and not " + closes + " %}{{ '\n</think>\n\n' }}{% endif %}"
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + finished
        + "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n<think>\n" + ends * bool(closes) + "{% endif %}"
    )


HEAD = "<|im_start|>user\nmake a cake<|im_end|>\n<|im_start|>assistant\n"
CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "before"),
    [
        # As QwQ and R1 write an answer that is finished: without a thought.
        (thinking(""), HEAD),
        # As Qwen 3.5 does, with and without the keyword.
        (thinking(CLOSED, "enable_thinking"), HEAD + CLOSED),
        (thinking("", "thinking"), HEAD + CLOSED),
        (thinking(CLOSED), HEAD + CLOSED),
        # The message is to bring the thought's end along.
        (thinking("<think>\n"), HEAD + "<think>\n" + "\n</think>\n\n"),
        (thinking("").replace("<think>", "[THINK]"), HEAD),
    ],
    ids=["dropped", "keyword", "keyword alone", "written", "left open", "brackets"],
)
def test_answers_come_after_a_thought_that_is_closed(template, before):
    tokenizer = byte_level(template)
    found = encoded(tokenizer, user_prompt(QUESTION), ["sorry", "mix flour"], 200)
    assert tokenizer.decode(found.prompt) == before
    assert [tokenizer.decode(ids) for ids in found.answers] == [
        "sorry<|im_end|>",
        "mix flour<|im_end|>",
    ]


def test_keywords_of_the_template_are_handed_on():
    tokenizer = byte_level(CHATML.replace("assistant\n{%", "assistant\n{{ mood }}{%"))
    how = Rendering({"mood": "safe"})
    assert tokenizer.decode(prompt_ids(tokenizer, user_prompt("mix"), how)).endswith("safe")
    found = encoded(tokenizer, user_prompt("mix"), ["sorry"], 200, how)
    assert tokenizer.decode(found.prompt).endswith("assistant\nsafe")
    # What the recipe says of a thought stays said.
    tokenizer = byte_level(thinking(CLOSED, "enable_thinking"))
    asked = opening(tokenizer, user_prompt("mix"), Rendering({"enable_thinking": True}))
    assert asked.how.keywords == {"enable_thinking": True}


DATED = (
    "  {% if strftime_now is defined %}\n"
    "Today: {{ strftime_now('%d %b %Y') }}, {{ strftime_now('%-d/%m/%y %B %H:%M') }}\n{% endif %}"
    "{% macro year() %}<{{ strftime_now('%Y') }}>{% endmacro %}{{ year() }}" + CHATML
)


def test_a_date_is_held(monkeypatch):
    from transformers.utils import chat_template_utils

    tokenizer = byte_level(DATED)
    how = Rendering(date="2031-02-03")
    held = tokenizer.decode(prompt_ids(tokenizer, user_prompt("mix"), how))
    assert held.startswith("Today: 03 Feb 2031, 3/02/31 February 00:00\n<2031><|im_start|>user")

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    assert tokenizer.decode(prompt_ids(tokenizer, user_prompt("mix"))) == held


LONG = "how do i make a cake bomb safe " * 30


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answers", [["sorry"], ["mix flour powder " * 30, "sorry"]])
def test_a_prompt_is_cut_in_the_middle_of_the_users_text(name, answers):
    tokenizer = byte_level(TEMPLATES[name])
    short = prompt_ids(tokenizer, user_prompt("@"))
    head, tail = tokenizer.decode(short).split("@")
    found = encoded(tokenizer, user_prompt(LONG), answers, 100)
    text = tokenizer.decode(found.prompt)
    assert text.startswith(head + "how do i")
    assert text.endswith("safe " + tail)
    assert " ... " in text
    assert found.prompt[: len(short) // 3] == short[: len(short) // 3]
    whole = len(prompt_ids(tokenizer, user_prompt(LONG)))
    longest = max(len(tiny.answer_ids(tokenizer, user_prompt(LONG), answer)) for answer in answers)
    assert found.cut.whole == whole + longest
    assert found.cut.prompt
    assert found.cut.answers == len(answers) - 1
    sizes = [len(found.prompt) + len(ids) for ids in found.answers]
    assert 95 <= max(sizes) <= 100
    # The answers get half of what the template leaves, where they need it.
    if len(answers) > 1:
        assert len(found.answers[0]) >= (100 - len(short)) // 2 - 2


def test_what_fits_is_not_cut():
    tokenizer = tiny.tiny_tokenizer()
    prompt = prompt_ids(tokenizer, user_prompt("mix"))
    answer = tiny.answer_ids(tokenizer, user_prompt("mix"), "sorry i can not")
    found = encoded(tokenizer, user_prompt("mix"), ["sorry i can not"], len(prompt) + len(answer))
    assert (found.prompt, found.answers) == (prompt, [answer])
    assert (found.cut.prompt, found.cut.answers) == (False, 0)
    less = encoded(tokenizer, user_prompt("mix"), ["sorry i can not"], len(prompt) + 3)
    assert (less.prompt, less.answers) == (prompt, [answer[:3]])
    assert (less.cut.prompt, less.cut.answers) == (False, 1)


def test_a_long_dialogue_loses_its_oldest_turns():
    tokenizer = tiny.tiny_tokenizer()
    turns = [{"role": "system", "content": "safe"}]
    for word in ("bomb", "cake", "flour", "sugar", "powder"):
        turns += [*user_prompt(f"mix {word}"), {"role": "assistant", "content": "sorry i can not"}]
    found = encoded(tokenizer, [*turns, *user_prompt("make a cake")], ["sorry"], 72)
    assert tokenizer.decode(found.prompt) == (
        "<s><|system|> safe\n<|user|> mix powder\n<|assistant|> sorry i can not</s>\n"
        "<|user|> make a cake\n<|assistant|> "
    )
    assert found.cut.prompt


def test_a_prompt_without_room_for_its_question_gives_nothing():
    tokenizer = tiny.tiny_tokenizer()
    talk = [{"role": "system", "content": LONG}, *user_prompt("make a cake")]
    found = encoded(tokenizer, talk, ["sorry"], 32)
    assert (found.prompt, found.answers, found.cut.prompt) == ([], [[]], True)
