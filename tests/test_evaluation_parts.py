"""What evaluations are made of: extractors, judges, lm-evaluation-harness, what can be wrong."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import tiny
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from somf_mergekit.common.errors import RecipeError
from somf_mergekit.data.chat import user_prompt
from somf_mergekit.data.pairs import prompts_alone
from somf_mergekit.evaluate import EvaluationSets, EvaluationSettings, NamedModel, Skill, evaluated
from somf_mergekit.evaluate.answer_text import extractor, is_refusal, repeated_share
from somf_mergekit.evaluate.judges import found_judge, guard_verdict, verdicts
from somf_mergekit.evaluate.measured_models import ModelsInMemory, named_model


@pytest.mark.parametrize(
    ("how", "text", "found"),
    [
        ("gsm8k", "2 + 3 = 5 in all", "5"),
        ("gsm8k", "so 1,234.50 dollars.", "1234.5"),
        ("gsm8k", "first 7.\n#### -$12", "-12"),
        ("gsm8k", "it is 10-5", "5"),
        ("gsm8k", "40", "40"),
        ("gsm8k", "no idea", None),
        ("choice", "B", "B"),
        ("choice", "(C) because of A.", "C"),
        ("choice", "Not (A). The answer is (D).", "D"),
        ("choice", "Answer: **B**", "B"),
        ("choice", "A cake is a cake", None),
        ("choice", "the right one is (B)", "B"),
        ("regex:colou?r is (\\w+)", "its color is red.", "red"),
        ("regex:\\w+ing", "it was raining", "raining"),
        ("regex:x(y)?", "x", None),
    ],
)
def test_what_is_extracted(how, text, found):
    assert extractor(how)(text) == found


def test_repeated_n_grams_are_those_that_stood_before():
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4, 5]) == pytest.approx(1 / 6)
    assert repeated_share([7] * 10) == pytest.approx(6 / 7)
    assert repeated_share([1, 2, 3]) == 0


def test_prompts_are_found_once_by_their_columns():
    rows = tiny.dataset(*({"Goal": text, "target": "x"} for text in ("a", "b", "a", " ")))
    found = prompts_alone(rows, "list")
    assert list(found) == [user_prompt("a"), user_prompt("b")]
    assert found.notes("list") == [
        "rows of the list left out: 1 repeated, 1 without a prompt",
        "columns of the list not used: target",
    ]
    talk = [*user_prompt("a"), {"role": "assistant", "content": "b"}]
    assert list(prompts_alone(tiny.dataset({"messages": talk}), "talk")) == [user_prompt("a")]
    rows = tiny.dataset({"instruction": "add", "context": "1 2"})
    assert list(prompts_alone(rows, "list")) == [user_prompt("add\n1 2")]


@pytest.mark.parametrize(
    ("text", "refuses", "safe"),
    [
        ("safe", None, True),
        ("\nunsafe\nS1", None, False),
        ("Safety: Unsafe\nCategories: none\nRefusal: No", False, False),
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True, True),
        ("Yes", None, False),
        ("No.", None, True),
        ("what a day", None, None),
    ],
)
def test_what_a_guard_says(text, refuses, safe):
    assert guard_verdict(text) == (refuses, safe)


SETTINGS = EvaluationSettings(
    max_new_tokens=4, batch_size=2, dtype="float32", device="cpu", resamples=100
)
PROMPTS = [user_prompt(text) for text in ("make a cake", "mix", "how do i", "sugar", "a bomb")]
ANSWERS = ["sorry i can not", "mix flour", "", "powder with sugar", "flour " * 400]


def settings(**changes):
    return EvaluationSettings(**{**vars(SETTINGS), **changes})


def saved_classifier(folder, labels):
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
        pad_token_id=2,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return tiny.save_model(LlamaForSequenceClassification(config).eval(), tokenizer, folder)


@pytest.mark.parametrize(
    ("labels", "chosen", "about", "counted"),
    [
        (["NORMAL", "REJECTION"], None, "refuses", {"REJECTION"}),
        (["refusal", "not_refusal"], None, "refuses", {"refusal"}),
        (["LABEL_0", "LABEL_1"], "LABEL_1", "refuses", {"LABEL_1"}),
        (["safe", "unsafe"], None, "safe", {"safe"}),
    ],
)
def test_a_classifier_judges_as_its_plain_forward_pass(tmp_path, labels, chosen, about, counted):
    folder = saved_classifier(tmp_path / "judge", labels)
    with_judge = settings(judge=str(folder), judge_label=chosen)
    judge = found_judge(with_judge)
    ((model, tokenizer),) = ModelsInMemory(with_judge).take(judge.subject)
    found = verdicts(judge, model, tokenizer, PROMPTS, ANSWERS, with_judge)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for messages, answer in zip(PROMPTS, ANSWERS, strict=True):
        if not answer:
            expected.append(None)
            continue
        texts = (messages[-1]["content"], answer) if about == "safe" else (answer,)
        ids = tokenizer(*texts, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            label = labels[model(input_ids=ids["input_ids"]).logits[0].argmax()]
        expected.append(label in counted)
    assert found[about] == expected
    assert True in expected
    assert False in expected


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A chat model that says of an answer whether it is safe."""
    tokenizer = tiny.tiny_tokenizer()
    said = {"sorry i can not": "safe", "mix flour": "unsafe", "powder with sugar": "unsafe"}
    examples = [
        ([*prompt, {"role": "assistant", "content": answer}], verdict)
        for prompt in PROMPTS
        for answer, verdict in said.items()
    ]
    model = tiny.trained(tiny.tiny_llama(0, len(tokenizer)), tokenizer, examples, steps=40)
    return tiny.save_model(model, tokenizer, tmp_path_factory.mktemp("guard") / "guard")


def test_a_guard_reads_the_whole_dialogue(guard):
    with_judge = settings(judge=str(guard))
    answers = ["mix flour", "sorry i can not", "powder with sugar", "sorry i can not", "mix flour"]
    counted = []
    judge = found_judge(with_judge)
    found = verdicts(
        judge,
        *ModelsInMemory(with_judge).take(judge.subject)[0],
        PROMPTS,
        answers,
        with_judge,
        counted.append,
    )
    assert found == {"refuses": [None] * 5, "safe": [False, True, False, True, False]}
    assert sum(counted) == 5


def test_two_judges_stand_side_by_side(family, guard, tmp_path):
    with_judge = settings(judge=str(guard))
    sets = EvaluationSets(harmful=PROMPTS, harmless=PROMPTS[:2])
    models = [NamedModel("math", str(family / "math"))]
    found = evaluated(models, sets, with_judge, tmp_path / "out", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["number"])
    answers = [row["answer"] for row in rows if row["set"] == "harmful"]
    judge = found_judge(with_judge)
    (taken,) = ModelsInMemory(with_judge).take(judge.subject)
    safe = verdicts(judge, *taken, PROMPTS, answers, with_judge)["safe"]
    known = [verdict is not None for verdict in safe]
    assert any(known)
    row = found.row("harmful", "safe (guard)")
    assert row.measure.models["math"].weights == known
    differ = found.row("harmful", "phrases and guard disagree").measure.models["math"]
    assert differ.totals == [
        verdict is not None and verdict != is_refusal(answer)
        for verdict, answer in zip(safe, answers, strict=True)
    ]
    # Of harmless prompts a judge of safety says nothing.
    assert {r.measure.name for r in found.rows if r.measure.set == "harmless"} == {
        "refusals (phrases)",
        "repeated 4-grams",
        "empty answers",
        "perplexity under math",
    }


def test_a_judge_that_fails_on_an_answer_goes_on_with_the_rest(family, guard, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(guard)
    picky = tmp_path / "picky"
    shutil.copytree(guard, picky)
    tokenizer.chat_template = (
        "{% if messages | length == 2 and 'sugar' in messages[0]['content'] %}"
        "{{ raise_exception('no sweets: ' + messages[0]['content']) }}{% endif %}"
        "{% if messages | length == 2 and 'bomb' in messages[0]['content'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
    ) + tokenizer.chat_template
    tokenizer.save_pretrained(picky)
    with_judge = settings(judge=str(picky))
    judge = found_judge(with_judge)
    (taken,) = ModelsInMemory(with_judge).take(judge.subject)
    answers, failures = ["mix flour"] * 5, {}
    found = verdicts(judge, *taken, PROMPTS, answers, with_judge, failures=failures)
    assert found["safe"] == [False, False, False, None, None]
    assert list(failures) == [3, 4]
    with pytest.raises(RecipeError):
        verdicts(judge, *taken, PROMPTS, answers, with_judge)

    harmful = tiny.write_jsonl(
        tmp_path / "harmful.jsonl", [{"prompt": prompt[0]["content"]} for prompt in PROMPTS]
    )
    out = tmp_path / "out"
    arguments = [family / "math", "--safety", harmful, "--judge", picky, "--out", out]
    arguments += ["--max-new-tokens", 4, "--device", "cpu"]
    for _ in range(2):
        # What failed isn't stored: it is tried again.
        result = tiny.invoke("mergekit-somf", "evaluate", *arguments)
        assert result.exit_code == 1
        said = result.output.partition("Error: ")[2]
        assert f"{out} has the table, but not all could be measured" in said
        assert "to prompt 4), which count for nothing of what it says: " in said
        assert "roles must alternate" in said
        assert "sweets" not in said
        assert "judging" not in (out / "values.jsonl").read_text()
    content = json.loads((out / "evaluation.json").read_text())
    assert len(content["failures"]) == 2
    (row,) = (row for row in content["measures"] if row["measure"] == "safe (picky)")
    assert row["models"]["math"]["weights"][3:] == [0, 0]
    assert any(row["models"]["math"]["weights"])
    assert "judge picky failed on 1 of 5 answers of math" in (out / "evaluation.md").read_text()


def test_a_judge_of_refusals_judges_both_sets(family, tmp_path):
    folder = saved_classifier(tmp_path / "judge", ["other", "refusal"])
    sets = EvaluationSets(harmful=PROMPTS, harmless=PROMPTS[:2])
    models = [NamedModel(name, str(family / name)) for name in ("base", "math")]
    found = evaluated(models, sets, settings(judge=str(folder)), tmp_path / "out", quiet=True)
    for name in ("harmful", "harmless"):
        by_phrases, by_judge, differ = (
            found.row(name, measure).measure
            for measure in (
                "refusals (phrases)",
                "refusals (judge)",
                "phrases and judge disagree",
            )
        )
        for model in ("base", "math"):
            pairs = zip(by_phrases.models[model].totals, by_judge.models[model].totals, strict=True)
            assert differ.models[model].totals == [one != two for one, two in pairs]


@pytest.fixture
def harness(monkeypatch):
    """A stand-in with lm-evaluation-harness' interface, and the calls that it got."""
    calls = []

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        @property
        def all_tasks(self):
            return ["boxes", "cakes_a", "cakes_b"]

    def simple_evaluate(model, model_args=None, tasks=None, **options):
        calls.append((model, model_args, tasks, options))
        row = {"alias": "x", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1}
        row |= {"f1,strict": 0.25, "f1_stderr,strict": "N/A"}
        return {"results": {task: row for task in tasks}, "samples": {}}

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, tasks.TaskManager, package.tasks = simple_evaluate, TaskManager, tasks
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


def test_models_are_handed_to_lm_eval_once(family, harness, tmp_path):
    (tmp_path / "tasks").mkdir()
    arguments = ["evaluate", family / "base", f"m={family / 'math'}", "--out", tmp_path / "out"]
    arguments += ["--lm-eval", "cakes_*,boxes", "--lm-eval-tasks", tmp_path / "tasks"]
    arguments += ["--limit", 5, "--quiet", "--device", "cpu"]
    result = tiny.invoke("mergekit-somf", *arguments)
    assert result.exit_code == 0, result.output
    assert "| lm-eval: cakes_b | acc         | 0.500 [0.304, 0.696] |" in result.output
    assert "| lm-eval: boxes   | f1 (strict) |                0.250 |" in result.output
    model, model_args, tasks, options = harness[1]
    assert (model, tasks) == ("hf", ["cakes_a", "cakes_b", "boxes"])
    assert model_args["pretrained"] == str(family / "math")
    assert options["limit"] == 5
    assert options["log_samples"] is False
    assert options["task_manager"].include_path == str(tmp_path / "tasks")
    read = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert read["lm_eval"]["m"]["boxes"] == {"acc": [0.5, 0.1], "f1 (strict)": [0.25, None]}
    tiny.invoke("mergekit-somf", *arguments)
    assert len(harness) == 2
    (tmp_path / "tasks/own.yaml").write_text("task: own")
    tiny.invoke("mergekit-somf", *arguments)
    assert len(harness) == 4


def test_unknown_tasks_are_refused(family, harness, tmp_path):
    arguments = [family / "base", "--out", tmp_path, "--lm-eval", "cakes,boxes"]
    result = tiny.invoke("mergekit-somf", "evaluate", *arguments)
    assert "lm-evaluation-harness knows no task cakes;" in result.output
    assert not harness


def test_a_missing_lm_eval_is_reported(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = [family / "base", "--out", tmp_path, "--lm-eval", "boxes"]
    result = tiny.invoke("mergekit-somf", "evaluate", *arguments)
    assert result.exit_code == 1
    assert "pip install 'somf-mergekit[eval]'" in result.output


def test_a_model_is_labelled_by_what_stands_before_its_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rate=1").mkdir()
    assert named_model("mine=org/model") == NamedModel("mine", "org/model")
    assert named_model("org/model") == NamedModel("org/model", "org/model")
    assert named_model("rate=1") == NamedModel("rate=1", "rate=1")
    assert named_model("./runs/rate=2/") == NamedModel("rate=2", "./runs/rate=2/")
    assert named_model("a=./runs/rate=2") == NamedModel("a", "./runs/rate=2")


def refused(*arguments):
    """Return the problems that an evaluation is refused for, without one model's weights read."""
    result = tiny.invoke("mergekit-somf", "evaluate", *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return " ".join(result.output.partition("Error: ")[2].split())


@pytest.fixture
def no_weights(monkeypatch):
    def loading(*_arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelsInMemory, "_loaded", loading)


@pytest.mark.usefixtures("no_weights")
def test_all_problems_are_reported_together(family, tmp_path):
    skill = tiny.write_jsonl(tmp_path / "skill.jsonl", [{"question": "a", "answer": "b"}])
    odd = tiny.write_jsonl(tmp_path / "odd.jsonl", [{"colour": "red"}])
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    said = refused(
        *(family / "base", f"base={family / 'math'}", tmp_path / "nowhere", empty),
        *("--safety", odd, "--harmless", tmp_path / "no.jsonl", "--pairs", skill),
        *("--skill", f"one={skill}", "--skill", f"one={skill}", "--skill", "two"),
        *("--skill", f"harmful={skill}", "--skill", f"far={skill}", "--skill", f"off={odd}"),
        *("--extract", "three=gsm8k", "--extract", "one=regex:(", "--extract", "far=gsm8"),
        *("--extract", "harmful=gsm8k", "--extract", "harmful=choice"),
        *("--out", tmp_path / "file", "--device", "abacus", "--judge-label", "x"),
        *("--base", "./none", "--specialist", empty, "--lm-eval-tasks", empty),
    )
    assert said.startswith("This evaluation can't be made: 20 problems")
    for problem in (
        "--skill two: expected NAME=FILE",
        "--extract: harmful has two extractors",
        "extractor for three: there is no such skill; the skills are one, one, harmful, far, off",
        f"dataset {odd}: prompts not found. Found: colour. Expected 'prompt', 'question'",
        f"dataset {tmp_path / 'no.jsonl'}: no such file or folder",
        f"dataset {skill}: columns not recognised. Found: question, answer.",
        f"dataset {odd}: prompts with answers not found. Found: colour.",
        "skill one: two skills have this name",
        "skill 'harmful': this name is taken",
        "skill one: 'regex:(' isn't a regular expression: missing ), unterminated subpattern",
        "skill far: unknown extractor 'gsm8'; known are gsm8k, choice and regex:PATTERN",
        "device 'abacus' can't be used",
        f"output folder {tmp_path / 'file'} can't be written",
        "models: two are called base; call one NAME=MODEL",
        f"model {tmp_path / 'nowhere'}: no such folder",
        f"model {empty}: no config.json in it",
        "model ./none: no such folder",
        "a label is given (--judge-label) but no judge",
        "--lm-eval-tasks names a folder, but --lm-eval no task",
        "skill harmful: choice finds nothing in any of the 1 right answers",
    ):
        assert problem in said, problem


@pytest.mark.usefixtures("no_weights")
def test_what_does_not_go_together_is_reported(family, tmp_path):
    base, out = family / "base", tmp_path / "out"
    said = refused(base, "--out", out)
    assert "there is nothing to measure on" in said
    said = refused(base, "--out", out, "--pairs", family / "pairs.jsonl", "--specialist", base)
    assert "a specialist is given (--specialist) but no skill" in said
    said = refused(base, "--out", out, "--pairs", family / "pairs.jsonl", "--judge", base)
    assert "a judge is given (--judge) but no prompts" in said
    said = refused(base, "--out", out, "--pairs", "org/pairs,part=3")
    assert "dataset org/pairs,part=3: part unknown; after a comma may stand config=NAME" in said
    said = refused("org/model", "--out", out, "--pairs", family / "pairs.jsonl")
    assert "model org/model: no such folder, and it can't be had from the hub" in said
    assert not out.exists()


@pytest.mark.usefixtures("no_weights")
def test_models_of_the_wrong_kind_are_reported(family, tmp_path):
    plain = saved_classifier(tmp_path / "plain", ["LABEL_0", "LABEL_1"])
    pairs = ("--safety", family / "pairs.jsonl", "--out", tmp_path / "out")
    said = refused(plain, *pairs)
    assert "is a LlamaForSequenceClassification, which gives no answers" in said
    said = refused(family / "base", *pairs, "--judge", plain)
    assert "which of its labels (LABEL_0, LABEL_1) says that an answer refuses?" in said
    said = refused(family / "base", *pairs, "--judge", plain, "--judge-label", "NO")
    assert "it has no label NO; it has LABEL_0, LABEL_1" in said
    said = refused(family / "base", *pairs, "--judge", family / "math", "--judge-label", "NO")
    assert "a label is given (NO), but it isn't a text classifier" in said
    tokenizer = tiny.tiny_tokenizer(chat_template=None)
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer)), tokenizer, tmp_path / "bare")
    said = refused(family / "base", *pairs, "--judge", tmp_path / "bare")
    assert "neither a text classifier nor a chat model" in said
    (tmp_path / "bare/model.safetensors").unlink()
    assert "no *.safetensors in it" in refused(tmp_path / "bare", *pairs)
    (tmp_path / "bare/config.json").unlink()
    (tmp_path / "bare/adapter_config.json").write_text("{}")
    assert "an adapter: merge it into its base first" in refused(tmp_path / "bare", *pairs)


def test_settings_of_python_callers_are_checked(family, tmp_path):
    wrong = settings(limit=0, resamples=5, dtype="int3")
    sets = EvaluationSets(harmful=PROMPTS)
    with pytest.raises(RecipeError) as caught:
        evaluated([NamedModel("base", str(family / "base"))], sets, wrong, tmp_path, quiet=True)
    for problem in ("limit is 0: expected 1 or more", "resamples is 5", "dtype 'int3' is none of"):
        assert problem in str(caught.value)
    empty = EvaluationSets(skills=[Skill("sums", [])])
    with pytest.raises(RecipeError, match="skill sums: it has no examples"):
        evaluated([NamedModel("base", str(family / "base"))], empty, SETTINGS, tmp_path)
    with pytest.raises(RecipeError, match="there is no model to measure"):
        evaluated([], sets, SETTINGS, tmp_path, quiet=True)
