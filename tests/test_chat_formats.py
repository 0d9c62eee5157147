"""Chat formats: what is learned from, and what is asked, is what the template writes."""

import pytest
import tiny
import torch

from somf_mergekit import RecipeError
from somf_mergekit.data.chat import encoded, prompt_ids, user_prompt
from somf_mergekit.data.rendering import Rendering
from somf_mergekit.evaluate.evaluation_sets import EvaluationSets
from somf_mergekit.evaluate.evaluation_settings import EvaluationSettings, NamedModel
from somf_mergekit.evaluate.generation import greedy_answers
from somf_mergekit.evaluate.runner import checked_participants

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}" + ALTERNATE + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system's text stands in the last turn, where that is the user's.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ system }}<|eot_id|>{% for m in turns %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT.\nCurrent date: {{ strftime_now('%Y-%m-%d') }}"
    "<|end|>{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|>"
    "# Instructions\n\n{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('channel tags in content') }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def thinking(last, generation):
    """A template that takes thoughts out of earlier answers, as those of Qwen 3 and R1 do."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set said = m.content.split('</think>') %}"
        "{% set thought = said[0].split('<think>')[-1].strip('\n') if said | length > 1 else '' %}"
        "{% if loop.last %}" + last + "{% endif %}{{ said[-1].lstrip('\n') }}{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + generation + "{% endif %}"
    )


THOUGHT = "<think>\n{{ thought }}\n</think>\n\n"
CLOSES = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}OTHER{% endif %}"
)
QWEN3 = thinking(THOUGHT, CLOSES.replace("OTHER", ""))
QWEN35 = thinking(THOUGHT, CLOSES.replace("OTHER", "<think>\n"))
R1 = thinking("", "<think>\n")
# Writes what it knows, and nothing of the rest.
DEAF = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}\n"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = {"role": "system", "content": "be safe"}
TALK = [*user_prompt("make a cake"), {"role": "assistant", "content": "with what"}]
TALK += user_prompt("flour")
CHATML = (
    "<|im_start|>user\nmake a cake<|im_end|>\n<|im_start|>assistant\nwith what<|im_end|>\n"
    "<|im_start|>user\nflour<|im_end|>\n<|im_start|>assistant\n"
)
SAFE = "<|im_start|>system\nbe safe<|im_end|>\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
TODAY = f"<s>{HEADER('system')}Today: 03 Feb 2031\n\n"
LLAMA_TALK = (
    f"<|eot_id|>{HEADER('user')}make a cake<|eot_id|>{HEADER('assistant')}with what<|eot_id|>"
    f"{HEADER('user')}flour<|eot_id|>{HEADER('assistant')}"
)
GEMMA_TALK = (
    "make a cake<end_of_turn>\n<start_of_turn>model\nwith what<end_of_turn>\n"
    "<start_of_turn>user\nflour<end_of_turn>\n<start_of_turn>model\n"
)
HARMONY_HEAD = "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2031-02-03<|end|>"
HARMONY_TALK = (
    "<|start|>user<|message|>make a cake<|end|><|start|>assistant<|channel|>final<|message|>"
    "with what<|end|><|start|>user<|message|>flour<|end|><|start|>assistant"
)
DEAF_TALK = "make a cake\n<|assistant|>with what</s>\n<|user|>flour\n<|assistant|>"
PLAIN_TALK = "User: make a cake\n\nAssistant: with what\n\nUser: flour\n\nAssistant:"
CLOSED = "<think>\n\n</think>\n\n"
# Of a template: the prompt of TALK, the same after SYSTEM, and an answer to both.
FORMATS = {
    "gemma": (
        GEMMA,
        f"<s><start_of_turn>user\n{GEMMA_TALK}",
        f"<s><start_of_turn>user\nbe safe\n\n{GEMMA_TALK}",
        "sorry<end_of_turn>",
    ),
    "mistral": (
        MISTRAL,
        "<s>[INST] make a cake[/INST] with what</s>[INST] flour[/INST]",
        "<s>[INST] make a cake[/INST] with what</s>[INST] be safe\n\nflour[/INST]",
        " sorry</s>",
    ),
    "llama 3": (LLAMA3, TODAY + LLAMA_TALK, f"{TODAY}be safe{LLAMA_TALK}", "sorry<|eot_id|>"),
    "qwen": (
        QWEN,
        f"<|im_start|>system\nYou are Qwen.<|im_end|>\n{CHATML}",
        SAFE + CHATML,
        "sorry<|im_end|>",
    ),
    "harmony": (
        HARMONY,
        HARMONY_HEAD + HARMONY_TALK,
        f"{HARMONY_HEAD}<|start|>developer<|message|># Instructions\n\nbe safe<|end|>"
        + HARMONY_TALK,
        "<|channel|>final<|message|>sorry<|return|>",
    ),
    "qwen 3": (QWEN3, CHATML, SAFE + CHATML, f"{CLOSED}sorry<|im_end|>"),
    "deaf": (DEAF, f"<|user|>{DEAF_TALK}", f"<|user|>be safe\n\n{DEAF_TALK}", "sorry</s>"),
    "none": (None, PLAIN_TALK, f"System: be safe\n\n{PLAIN_TALK}", " sorry</s>"),
}
# Where the prompt opens a thought, answers are learned after it.
THINKING = {
    "qwen 3.5": (QWEN35, CHATML + CLOSED, "sorry<|im_end|>"),
    "r1": (R1, CHATML, "sorry<|im_end|>"),
}
HOW = Rendering(date="2031-02-03")


class Recording:
    """A model that answers nothing, and has what it was asked."""

    device = "cpu"

    def generate(self, input_ids, **_options):
        self.asked = input_ids.tolist()
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 1)], dim=1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_is_what_the_template_writes(name):
    template, bare, with_system, answer = FORMATS[name]
    tokenizer = tiny.tiny_tokenizer(template)
    for messages, prompt in ((TALK, bare), ([SYSTEM, *TALK], with_system)):
        found = encoded(tokenizer, messages, ["sorry", "sorry"], 400, HOW)
        assert tokenizer.decode(found.prompt) == prompt
        assert [tokenizer.decode(ids) for ids in found.answers] == [answer] * 2
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert found.prompt + found.answers[0] == whole
        # Models are asked the same.
        assert prompt_ids(tokenizer, messages, HOW) == found.prompt
        moved = messages != TALK and name in ("gemma", "deaf")
        assert found.cut.system == moved
    # A long talk keeps its system text, wherever it stands.
    longer = [SYSTEM, *TALK[:2] * 20, *user_prompt("flour")]
    cut = encoded(tokenizer, longer, ["sorry"], 220, HOW)
    assert cut.cut.prompt
    assert tokenizer.decode(cut.prompt).count("be safe") == 1


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("said", ["sorry", "<think>how</think>sorry", "how\n</think>\n\nsorry"])
def test_a_thought_is_neither_learned_nor_doubled(name, said):
    template, prompt, answer = THINKING[name]
    tokenizer = tiny.tiny_tokenizer(template)
    found = encoded(tokenizer, TALK, [said, "<think>how"], 400)
    assert tokenizer.decode(found.prompt) == prompt
    assert [tokenizer.decode(ids) for ids in found.answers] == [answer, ""]
    assert found.cut.thoughts == 1 + (said != "sorry")
    # Asked, the model thinks.
    assert tokenizer.decode(prompt_ids(tokenizer, TALK)) == f"{CHATML}<think>\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen 3", "<think>how</think>\nsorry"),
        ("none", "<thinking>how</thinking>sorry"),
        (
            "harmony",
            "<|channel|>analysis<|message|>how<|end|><|start|>assistant<|channel|>final<|message|>"
            "sorry",
        ),
        ("gemma", "<|channel>thought\nhow<channel|>sorry"),
    ],
)
def test_an_answer_loses_its_own_thought(name, said):
    template, prompt, _, answer = FORMATS[name]
    tokenizer = tiny.tiny_tokenizer(template)
    found = encoded(tokenizer, TALK, [said], 400, HOW)
    assert (tokenizer.decode(found.prompt), tokenizer.decode(found.answers[0])) == (prompt, answer)


def test_generation_asks_in_the_same_form():
    tokenizer, model = tiny.tiny_tokenizer(GEMMA), Recording()
    greedy_answers(model, tokenizer, [[SYSTEM, *TALK]], max_new_tokens=1, batch_size=1)
    assert [tokenizer.decode(ids) for ids in model.asked] == [FORMATS["gemma"][2]]


TWICE = [*user_prompt("how"), *user_prompt("make"), *user_prompt("mix")]
REFUSALS = {
    "alternation": (GEMMA, TWICE, "roles user, user, user: roles must alternate."),
    "alternation after a system message": (
        GEMMA,
        [SYSTEM, *TWICE],
        "roles system, user, user, user: roles must alternate.",
    ),
    "a message that is left out": (
        DEAF,
        [*user_prompt("how"), {"role": "tool", "content": "3"}, *user_prompt("mix")],
        "roles user, tool, user, of which it leaves tool out.",
    ),
    "a second system message": (
        DEAF,
        [*user_prompt("how"), SYSTEM, *user_prompt("mix")],
        "roles user, system, user, of which it leaves system out.",
    ),
}


@pytest.fixture(scope="module")
def chat_family(tmp_path_factory):
    """A model and its fine-tuned one, whose tokenizer gets a template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny.tiny_tokenizer(GEMMA)
    base = tiny.tiny_llama(0, len(tokenizer))
    tiny.save_model(base, tokenizer, folder / "base")
    tiny.save_model(tiny.perturbed(base, 1), tokenizer, folder / "math")
    return folder


def checked(folder, place, template, rows):
    tokenizer = tiny.tiny_tokenizer(template)
    for name in ("base", "math"):
        tokenizer.save_pretrained(folder / name)
    data = tiny.write_jsonl(place / "rows.jsonl", rows)
    values = {"max_steps": 1, "batch_size": 4, "max_length": 200, "safety_dataset": str(data)}
    content = tiny.recipe(folder / "base", [folder / "math"], **values)
    file = tiny.write_recipe(place / "recipe.yml", content)
    return tiny.invoke("mergekit-somf", "check", file)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_row_is_named_before_any_model_is_loaded(name, chat_family, tmp_path):
    template, messages, why = REFUSALS[name]
    rows = tiny.preference_rows(8)
    rows[5]["prompt"] = messages
    result = checked(chat_family, tmp_path, template, rows)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    expected = f"the chat template refuses a conversation of the {why}"
    assert f"dataset {tmp_path / 'rows.jsonl'}, row 5: {expected} Leave such rows out, or" in said
    # Likewise where models are measured.
    sets = EvaluationSets(harmful=[user_prompt("how"), messages])
    models = [NamedModel("tested", str(chat_family / "base"))]
    settings = EvaluationSettings(dtype="float32", device="cpu")
    with pytest.raises(RecipeError, match="base, prompt 1 of harmful: the chat template"):
        checked_participants(models, sets, settings, tmp_path / "out", [])


def test_a_check_counts_what_the_template_has_no_place_for(chat_family, tmp_path):
    rows = tiny.preference_rows(8)
    for row in rows[:3]:
        row["system"] = "be safe"
    rows[4]["chosen"] = f"<think>how</think>{rows[4]['chosen']}"
    result = checked(chat_family, tmp_path, GEMMA, rows)
    assert result.exit_code == 0, result.output
    assert result.output.strip().splitlines()[-2:] == [
        "system messages of the safety dataset put before the first user message, since the chat "
        "template has no place for them: 3",
        "thoughts before answers of the safety dataset left out: 1",
    ]
