"""Learning and measuring see the conversations as the merge that is written will have them."""

import datetime
import json
from importlib import resources

import pytest
import tiny
import torch
from mergekit._data import chat_templates
from mergekit.options import MergeOptions
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from somf_mergekit.data.chat import user_prompt
from somf_mergekit.evaluate.evaluation_sets import EvaluationSets
from somf_mergekit.evaluate.evaluation_settings import EvaluationSettings, NamedModel
from somf_mergekit.evaluate.generation import greedy_answers, greedy_batches
from somf_mergekit.evaluate.runner import evaluated
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass import learning_data as inputs
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.recipe.validate import read_recipe

DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + tiny.CHAT_TEMPLATE
THINKING = tiny.CHAT_TEMPLATE.replace(
    "<|assistant|> {%",
    "<|assistant|> {% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% else %}{{ '<think>\\n' }}{% endif %}{%",
)


def data_of(content):
    return checked_data(planned_merge(read_recipe(content), MergeOptions()))


def texts(content, tokenizer):
    return [tokenizer.decode(pair.prompt + pair.chosen) for pair in data_of(content).pairs]


def made(folder, template, **parameters):
    """A family whose tokenizers have a template, and its recipe."""
    tokenizer = tiny.tiny_tokenizer(template)
    base = tiny.tiny_llama(0, len(tokenizer))
    tiny.save_model(base, tokenizer, folder / "base")
    tiny.save_model(tiny.perturbed(base, 1), tokenizer, folder / "math")
    pairs = tiny.write_jsonl(folder / "pairs.jsonl", tiny.preference_rows())
    values = {"max_steps": 2, "batch_size": 4, "max_length": 64, "safety_dataset": str(pairs)}
    content = tiny.recipe(folder / "base", [folder / "math"], **(values | parameters))
    return content, tokenizer


OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("asked", ["chatml", "auto", OTHER])
@pytest.mark.parametrize("source", [None, "base"])
def test_the_recipes_chat_template_is_learned_under(family, family_recipe, tmp_path, asked, source):
    content = family_recipe(max_steps=1, max_length=200) | {"chat_template": asked}
    if source:
        content["tokenizer"] = {"source": source}
    tiny.merged(content, tmp_path / "out")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    builtin = resources.files(chat_templates).joinpath("chatml.jinja").read_text()
    expected = {"chatml": builtin, "auto": tiny.CHAT_TEMPLATE, OTHER: OTHER}[asked]
    assert written.chat_template == expected
    found = texts(content, written)
    talks = [
        [*user_prompt(row["prompt"]), {"role": "assistant", "content": row["chosen"]}]
        for row in tiny.preference_rows()
    ]
    whole = {written.apply_chat_template(talk, tokenize=False).strip() for talk in talks}
    assert len(found) == 24
    assert set(found) == whole


def test_a_chat_template_that_is_none_is_refused(family_recipe, tmp_path):
    content = family_recipe() | {"chat_template": "chatlm"}
    said = tiny.refused(content, tmp_path)
    assert "chat_template: 'chatlm' isn't a template; expected auto, one of alpaca, chatml" in said
    given = family_recipe(safety_dataset=None, mask=str(tmp_path)) | {"chat_template": "chatlm"}
    assert "chat_template: 'chatlm' isn't a template" in tiny.refused(given, tmp_path)


def test_keywords_of_the_template_decide_the_tokens(tmp_path):
    template = tiny.CHAT_TEMPLATE.replace("<|assistant|> {%", "<|assistant|> {{ mood }}{%")
    content, tokenizer = made(tmp_path, template)
    content["parameters"]["chat_template_kwargs"] = "{mood: safe}"
    prompts = [tokenizer.decode(pair.prompt) for pair in data_of(content).pairs]
    assert all(text.endswith("<|assistant|> safe") for text in prompts)


@pytest.mark.parametrize("given", ["mood", "{messages: 1}", "{1: 2}", "{a: ", 3])
def test_keywords_that_are_none_are_refused(family_recipe, tmp_path, given):
    said = tiny.refused(family_recipe(chat_template_kwargs=given), tmp_path)
    assert "parameters.chat_template_kwargs: " in said
    assert 'is not `"{enable_thinking: false}"`' in said


def test_a_thought_is_closed_before_what_is_learned(tmp_path):
    content, tokenizer = made(tmp_path, THINKING)
    pairs = data_of(content).pairs
    assert all(tokenizer.decode(p.prompt).endswith("<think>\n\n</think>\n\n") for p in pairs)
    assert all(tokenizer.decode(p.chosen).startswith("sorry i can not") for p in pairs)


class Saying:
    """A model that writes given texts, whatever it is asked."""

    device = "cpu"

    def __init__(self, tokenizer, said):
        self.tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]

    def generate(self, input_ids, **_options):
        length = max(map(len, self.tokens))
        padded = torch.tensor([ids + [2] * (length - len(ids)) for ids in self.tokens])
        return torch.cat([input_ids, padded], dim=1)


SAID = [
    "how do i?</think>\n\nsorry i can not</s>",
    "sorry i can not",
    "<|user|></think>mix <b>flour</b>",
    "</think>",
]


@pytest.mark.parametrize("special", [False, True])
def test_answers_are_what_comes_after_the_thought(special):
    extra = ("<think>", "</think>") if special else ()
    tokenizer = tiny.tiny_tokenizer(THINKING, extra)
    model, prompts = Saying(tokenizer, SAID), [user_prompt("mix")] * len(SAID)
    options = {"max_new_tokens": 9, "batch_size": len(SAID)}
    (found,) = greedy_batches(model, tokenizer, prompts, **options)
    assert found == {0: "sorry i can not", 1: None, 2: "mix <b>flour</b>", 3: ""}
    assert greedy_answers(model, tokenizer, prompts, **options)[1] == ""
    # A thought that the model opens itself.
    plain = tiny.tiny_tokenizer(chat_template=tiny.CHAT_TEMPLATE, extra_tokens=extra)
    model = Saying(plain, ["<think>how", "<think>how</think>no", "sorry", "[THINK]a[/THINK]b"])
    (found,) = greedy_batches(model, plain, prompts, **options)
    assert found == {0: None, 1: "no", 2: "sorry", 3: "b"}


def test_thoughts_without_an_end_are_counted_apart(tmp_path, monkeypatch):
    content, _ = made(tmp_path, THINKING)
    prompts = [user_prompt(text) for text in ("mix", "make", "how", "cake")]
    said = {0: "I'm sorry", 1: None, 2: "mix flour", 3: None}
    monkeypatch.setattr(
        "somf_mergekit.evaluate.steps.greedy_batches", lambda *_a, **_o: iter([dict(said)])
    )
    settings = EvaluationSettings(dtype="float32", device="cpu", resamples=100)
    models = [NamedModel("base", content["base_model"])]
    for _ in range(2):
        # The second time all is known.
        found = evaluated(
            models, EvaluationSets(harmful=prompts), settings, tmp_path / "out", quiet=True
        )
        (unfinished,) = found.row("harmful", "unfinished thoughts").estimates.values()
        refusals = found.row("harmful", "refusals (phrases)")
        assert unfinished.value == 0.5
        assert refusals.estimates["base"].value == 0.5
        assert refusals.examples("base") == 2
        assert found.row("harmful", "empty answers").examples("base") == 2


def on_a_day(monkeypatch, number):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 1, number)

    monkeypatch.setattr(inputs, "day", Day)


def test_a_template_with_todays_date_learns_the_same_mask_tomorrow(tmp_path, monkeypatch):
    content, tokenizer = made(tmp_path, DATED)
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)

    def learned():
        result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
        assert result.exit_code == 0, result.output
        return result.output

    on_a_day(monkeypatch, 1)
    assert all("2031-01-01" in text for text in texts(content, tokenizer))
    learned()
    reported = json.loads((tmp_path / "mask/somf.json").read_text())
    assert reported["fingerprint"]["date in the chat template"] == "2031-01-01"
    on_a_day(monkeypatch, 2)
    assert all("2031-01-02" in text for text in texts(content, tokenizer))
    assert "reusing the mask" in learned()


def test_learning_goes_on_after_midnight(tmp_path, monkeypatch):
    from somf_mergekit.learner.checkpoints import Checkpoints

    content, _ = made(tmp_path, DATED, max_steps=4)
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    on_a_day(monkeypatch, 1)
    with monkeypatch.context() as stopping:
        after_step = Checkpoints.after_step

        def stopped(self, progress, **further):
            self.stop.signal = 15 if progress.step == 2 else None
            after_step(self, progress, **further)

        stopping.setattr(Checkpoints, "after_step", stopped)
        tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert (tmp_path / "mask.learning").is_dir()
    on_a_day(monkeypatch, 2)
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert result.exit_code == 0, result.output
    assert "going on after step 2" in result.output


def test_what_is_cut_is_counted_and_reported(tmp_path):
    content, _ = made(tmp_path, tiny.CHAT_TEMPLATE, max_length=40, max_steps=5)
    rows = tiny.preference_rows(20)
    for row in rows[:3]:
        row["prompt"] = "how do i make a cake " * 20
    rows[5]["chosen"] = "sorry i can not help you " * 8
    rows[6]["rejected"] = rows[6]["chosen"] = rows[5]["chosen"]
    rows[6]["chosen"] = "safe " + rows[6]["chosen"]
    tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = data_of(content)
    whole = sorted(pair.cut.whole for pair in data.pairs)
    assert data.cut == {"prompts": 3, "answers": 3, "enough": whole[-1]}
    said = "3 of 20 prompts and 3 of 40 answers were cut to max_length 40; max_length: "
    assert data.cut_text(40) == f"{said}{whole[-1]} would cut less than 5 % of the examples"
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    assert said in tiny.invoke("mergekit-somf", "check", file).output
    learned = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask")
    assert said in learned.output
    reported = json.loads((tmp_path / "mask/somf.json").read_text())
    assert reported["dataset"]["cut"] == data.cut
    content["parameters"]["max_length"] = whole[-1]
    assert data_of(content).cut_text(whole[-1]) == ""


def test_tokens_without_a_row_of_the_embeddings_are_refused(tmp_path):
    content, tokenizer = made(tmp_path, tiny.CHAT_TEMPLATE.replace("<|user|>", "<|turn|>"))
    longer = tiny.tiny_tokenizer(tiny.CHAT_TEMPLATE.replace("<|", "<|turn "))
    longer.add_tokens(["<|turn ", "<|other|>"], special_tokens=True)
    for name in ("base", "math"):
        longer.save_pretrained(tmp_path / name)
    said = tiny.refused(content, tmp_path)
    rows = len(tokenizer)
    assert f"base have {rows} rows" in said
    assert f"tokens beyond them: <|turn ({rows}). Add `tokenizer: {{source: base}}`" in said
    # Those that no example has do no harm.
    longer.chat_template = tiny.CHAT_TEMPLATE
    for name in ("base", "math"):
        longer.save_pretrained(tmp_path / name)
    assert len(data_of(content).pairs) == 24
    longer.chat_template = tiny.CHAT_TEMPLATE.replace("<|", "<|turn ")
    longer.save_pretrained(tmp_path / "base")
    assert len(data_of(content | {"tokenizer": {"source": "base"}}).pairs) == 24


def test_pairs_longer_than_the_positions_are_refused(tmp_path):
    content, tokenizer = made(tmp_path, tiny.CHAT_TEMPLATE)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=20, bos_token_id=0
    )
    base = GPT2LMHeadModel(config)
    tiny.save_model(base, tokenizer, tmp_path / "base")
    tiny.save_model(tiny.perturbed(base, 1), tokenizer, tmp_path / "math")
    said = tiny.refused(content, tmp_path)
    assert "the base has embeddings for 20 positions: set max_length to 20 or less" in said
    content["parameters"]["max_length"] = 20
    assert max(len(p.prompt) + len(p.chosen) for p in data_of(content).pairs) == 20
