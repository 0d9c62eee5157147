"""What is read of a dataset: each row as it is meant, or counted with a reason."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest
import tiny
from mergekit.options import MergeOptions

from somf_mergekit import RecipeError, read_answers, read_pairs, read_prompts
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.recipe.validate import read_recipe

ASKED = {"role": "user", "content": "how?"}
SYSTEM = {"role": "system", "content": "be brief"}
TURN = [{"role": "assistant", "content": "what?"}, {"role": "user", "content": "that"}]
NO, SO = ({"role": "assistant", "content": text} for text in ("no", "so"))
MARKED = "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n"


def jsonl(folder, *rows):
    return str(tiny.write_jsonl(folder / "rows.jsonl", rows))


def csv(folder, *rows):
    datasets.Dataset.from_list(list(rows)).to_csv(str(folder / "rows.csv"))
    return str(folder / "rows.csv")


def pair_of(answers, **prompt):
    return prompt | dict(zip(("chosen", "rejected"), answers, strict=True))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (pair_of([[ASKED, *TURN, NO], [ASKED, *TURN, SO]], prompt="how?"), [ASKED, *TURN]),
        (pair_of([[ASKED, *TURN, NO], [ASKED, *TURN, SO]], prompt="that"), [ASKED, *TURN]),
        (pair_of([[SYSTEM, ASKED, NO], [SYSTEM, ASKED, SO]], prompt="how?"), [SYSTEM, ASKED]),
        (pair_of([[*TURN, NO], [*TURN, SO]], prompt=[ASKED]), [ASKED, *TURN]),
        (pair_of(["no", "so"], prompt=[{**SYSTEM, "name": "x"}, ASKED]), [SYSTEM, ASKED]),
        (pair_of([[{**NO, "weight": 1}], [SO]], prompt=[ASKED]), [ASKED]),
        (pair_of(["no", "so"], system="be brief", question="how?"), [SYSTEM, ASKED]),
        (pair_of(["no", "so"], system="be brief", input="how?"), [SYSTEM, ASKED]),
        (pair_of(["no", "so"], system="", input="how?"), [ASKED]),
        (pair_of([[ASKED, NO], [ASKED, SO]], system="be brief"), [SYSTEM, ASKED]),
        (pair_of(["no", "so"], prompt="\n\nHuman: how?\n\nAssistant:"), [ASKED]),
        (
            pair_of(
                [f"\n\nHuman: how?\n\nAssistant: {text}" for text in ("no", "so")], prompt="how?"
            ),
            [ASKED],
        ),
        (
            pair_of(
                ["no", "so"],
                prompt=[{"role": "user", "content": [{"type": "text", "text": "how?"}]}],
            ),
            [ASKED],
        ),
        (pair_of([json.dumps([NO]), json.dumps([SO])], prompt=json.dumps([ASKED])), [ASKED]),
    ],
    ids=[
        *("dialogues beside their first question", "beside their last", "with a system message"),
        *("answers of several messages", "uneven keys", "uneven keys of answers", "orca"),
        *("orca's other columns", "an empty system message", "a system column and dialogues"),
        *("HH-RLHF prompt", "HH-RLHF dialogues", "parts of text", "JSON text"),
    ],
)
def test_a_pair_has_the_whole_conversation(row, prompt, tmp_path):
    # Keys that a message lacks in one row, it has in another.
    other = {**row, "score_chosen": 1.0}
    pairs = read_pairs(jsonl(tmp_path, row, other))
    expected = (tuple((m["role"], m["content"]) for m in prompt), "no", "so")
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [expected] * 2
    assert [p.row for p in pairs] == [0, 1]
    assert pairs.notes("data") == ["columns of the data not used: score_chosen"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair_of(["no", "so"], prompt=MARKED), "already in a chat template"),
        (pair_of(["no", "so"], prompt="[INST] how? [/INST]"), "already in a chat template"),
        (pair_of(["no", "so"], prompt="<s><|user|>\nhow?"), "already in a chat template"),
        (pair_of(["no", "so"], prompt="how?\n\n### Response:"), "already in a chat template"),
        (pair_of(["no<|im_end|>\n", "so"], prompt="how?"), "already in a chat template"),
        (
            pair_of(["no", "so"], prompt=[ASKED, {**NO, "tool_calls": [{"name": "f"}]}]),
            "with a tool call",
        ),
        (
            pair_of(["no", "so"], prompt=[{"role": "user", "content": [{"type": "image"}]}]),
            "with a message that is not text",
        ),
        (
            pair_of([[ASKED, *TURN, NO], [ASKED, *TURN, SO]], prompt="else"),
            "whose dialogue does not have the prompt in it",
        ),
        (pair_of([[*TURN, NO], [SO]], prompt="how?"), "without a shared beginning"),
        (pair_of([TURN, [SO]], prompt="how?"), "not ending with an assistant's answer"),
        (
            pair_of(["[{'role': 'assistant', 'content': 'no'}]", "so"], prompt="how?"),
            "with a message list written as text that is not JSON",
        ),
        (pair_of(["no\ud800", "so"], prompt="how?"), "with text that is not Unicode"),
        (pair_of([5, "so"], prompt="how?"), "unreadable"),
        (pair_of([None, "so"], prompt="how?"), "without an answer"),
    ],
)
def test_a_pair_that_would_be_read_otherwise_is_counted(row, reason, tmp_path):
    pairs = read_pairs(jsonl(tmp_path, pair_of(["no", "so"], prompt="how?"), row))
    assert len(pairs) == 1
    assert pairs.left_out.reasons == {reason: 1}


HUMAN, GPT_NO, GPT_SO = (
    {"from": name, "value": text}
    for name, text in (("human", "how?"), ("gpt", "no"), ("gpt", "so"))
)
HH = "\n\nHuman: hi\n\nAssistant: what?\n\nHuman: how?\n\nAssistant: {}".format
BEGINNING = [{"role": "user", "content": "hi"}, TURN[0], ASKED]
SCORED = {"prompt_id": "1", "messages": [ASKED, NO], "score_chosen": 8.0, "score_rejected": 2.0}
STRUCT = {name: [m[name] for m in (SYSTEM, ASKED)] for name in ("role", "content")}
# As data sets are published: a row (or several) of each, and the prompt of its pair.
PUBLISHED = {
    "HH-RLHF": ([pair_of([HH("no"), HH("so")])], BEGINNING),
    "PKU-SafeRLHF": (
        [
            {
                **{"prompt": "how?", "response_0": "so", "response_1": "no"},
                **{"is_response_0_safe": False, "is_response_1_safe": True},
                **{"better_response_id": 0, "safer_response_id": 1},
            }
        ],
        [ASKED],
    ),
    "UltraFeedback": ([pair_of([[ASKED, NO], [ASKED, SO]], prompt="how?", **SCORED)], [ASKED]),
    "ORPO mix": ([pair_of([[ASKED, NO], [ASKED, SO]], prompt="how?", question="how?")], [ASKED]),
    "Orca": ([pair_of(["no", "so"], system="be brief", question="how?")], [SYSTEM, ASKED]),
    "Argilla": (
        [{"instruction": "how?", "chosen_response": "no", "rejected_response": "so"}],
        [ASKED],
    ),
    "distilabel": (
        [
            pair_of(
                ["no", "so"],
                **{"system": "be brief", "input": "how?", "generations": ["so", "no"]},
                rating=[1.0, 5.0],
            )
        ],
        [SYSTEM, ASKED],
    ),
    "ShareGPT": ([pair_of([GPT_NO, GPT_SO], conversations=[HUMAN])], [ASKED]),
    "ShareGPT with an answer": (
        [pair_of([[GPT_NO], [GPT_SO]], conversations=[HUMAN, GPT_NO])],
        [ASKED],
    ),
    "ShareGPT dialogues": (
        [pair_of([[HUMAN, GPT_NO], [HUMAN, GPT_SO]], conversations=[HUMAN], system="be brief")],
        [SYSTEM, ASKED],
    ),
    "messages and turns": ([pair_of([NO, SO], messages=[SYSTEM, ASKED])], [SYSTEM, ASKED]),
    "a sequence of structs": ([pair_of([NO, SO], prompt=STRUCT)], [SYSTEM, ASKED]),
    "KTO": (
        [
            {"prompt": "how?", "completion": "so", "label": False},
            {"prompt": "how?", "completion": "no", "label": True},
        ],
        [ASKED],
    ),
    "KTO messages": (
        [
            {"prompt": [SYSTEM, ASKED], "completion": [NO], "label": True},
            {"prompt": [SYSTEM, ASKED], "completion": [SO], "label": False},
        ],
        [SYSTEM, ASKED],
    ),
    "labelled dialogues": (
        [
            {"conversations": [HUMAN, GPT_NO], "label": "true"},
            {"conversations": [HUMAN, GPT_SO], "label": "false"},
        ],
        [ASKED],
    ),
    "BeaverTails": (
        [
            {"prompt": "how?", "response": "so", "category": {"theft": True}, "is_safe": False},
            {"prompt": "how?", "response": "no", "category": {"theft": False}, "is_safe": True},
        ],
        [ASKED],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_data_are_read_in_every_kind_of_file(name, tmp_path):
    rows, prompt = PUBLISHED[name]
    expected = (tuple((m["role"], m["content"]) for m in prompt), "no", "so")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    parquet_file(tmp_path / "rows.parquet", rows)
    saved(tmp_path / "saved", rows)
    for source in (packed, tmp_path / "rows.parquet", tmp_path / "saved"):
        split = "test" if source.is_dir() else "train"
        (pair,) = read_pairs(str(source), split)
        assert (pair.prompt, pair.chosen, pair.rejected) == expected
        assert rows[pair.row].get("label", True) in (True, "true")


@pytest.mark.parametrize("name", ["rows.jsonl.bz2", "rows.csv.gz", "rows.json.xz"])
def test_packed_files_are_read_alone_and_in_a_folder(name, tmp_path):
    row = pair_of(["no", "so"], prompt="how?")
    text = ",".join(row) + "\n" + ",".join(row.values()) if "csv" in name else json.dumps(row)
    pack = {"2": bz2.compress, "z": gzip.compress, "xz": lzma.compress}
    pack = next(pack[end] for end in ("xz", "2", "z") if name.endswith(end))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_bytes(pack(text.encode()))
    for source in (tmp_path / "rows", tmp_path / "rows" / name):
        assert [pair.chosen for pair in read_pairs(str(source))] == ["no"]


def test_what_unpacks_a_file_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("fsspec.compression.available_compressions", lambda: ["gzip"])
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(RecipeError, match=r"rows\.jsonl\.zst: .*: pip install zstandard"):
        read_pairs(str(tmp_path / "rows.jsonl.zst"))


def test_each_wanted_answer_is_paired_with_each_other_one(tmp_path):
    def row(prompt, completion, label):
        return {"prompt": prompt, "completion": completion, "label": label, "id": 1}

    rows = [row("how?", text, label) for text, label in (("no", 1), ("so", 0), ("not", 1))]
    rows += [row("what?", "so", 0), row("which?", "no", 1), row("how?", "", 1)]
    rows += [row("same?", "no", 1), row("same?", "no", 0), row("none?", "no", None)]
    rows += [row("many?", f"no {n}", 1) for n in range(9)]
    rows += [row("many?", f"so {n}", 0) for n in range(9)]
    pairs = read_pairs(jsonl(tmp_path, *rows))
    found = [(dict(p.prompt)["user"], p.chosen, p.rejected, p.row) for p in pairs]
    assert found[:2] == [("how?", "no", "so", 0), ("how?", "not", "so", 2)]
    # Sixteen of 81, the first ones of both.
    assert len(found) == 2 + 16
    assert {(one, two) for _, one, two, _ in found[2:]} >= {
        (f"no {one}", f"so {two}") for one in range(5) for two in range(5 - one)
    }
    assert all(rows[row]["completion"] == chosen for _, chosen, _, row in found)
    met = {text for _, *both, _ in found[2:] for text in both}
    assert pairs.left_out.reasons == {
        "whose prompt has answers of one kind alone": 2,
        "without an answer": 1,
        "with chosen equal to rejected": 2,
        "with neither true nor false for label": 1,
        "beyond the first 16 pairs of their prompt": 18 - len(met),
    }
    assert pairs.unused == ["id"]
    # They are drawn like any others.
    assert sorted(p.chosen for p in pairs.sampled(None, 0)) == sorted(p.chosen for p in pairs)


def test_labelled_answers_are_learned_from_as_their_pairs_are(family_recipe, tmp_path):
    rows = tiny.preference_rows(60)
    labelled = [
        {"prompt": row["prompt"], "response": row[name], "is_safe": name == "chosen"}
        for name in ("rejected", "chosen")
        for row in rows
    ]
    rows = [row for row in rows if [r["prompt"] for r in rows].count(row["prompt"]) == 1]
    prompts = {row["prompt"] for row in rows}
    labelled = [row for row in labelled if row["prompt"] in prompts]
    tokens = []
    for given in (rows, labelled):
        content = family_recipe(safety_dataset=jsonl(tmp_path, *given), max_steps=9)
        data = checked_data(planned_merge(read_recipe(content), MergeOptions()))
        assert len(data.held_out) >= 5
        tokens.append(sorted((p.prompt, p.chosen, p.rejected) for p in data.pairs + data.held_out))
    assert len(tokens[0]) == len(rows)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "how?", "answer": "no"},
            "Found: question, answer. .* Nearest is 'question', 'answer', 'is_safe': add "
            "'is_safe'; or set `objective: sft`",
        ),
        (
            {"conversations": [HUMAN, GPT_NO]},
            "Found: conversations. .* Nearest is 'conversations', .*; or set `objective: sft`",
        ),
        (
            {"prompt": "how?", "chosen": "no", "loser": "so"},
            "Found: prompt, chosen, loser. .* Nearest is 'prompt', 'chosen', 'rejected': add",
        ),
        (
            {"ask": "how?", "rejected_response": "so"},
            "Nearest is 'prompt', 'chosen_response', 'rejected_response': add 'prompt', "
            r"'chosen_response'\.",
        ),
        (
            {"prompt": "how?", "response_0": "no", "response_1": "so", "is_response_0_safe": True},
            "Nearest is 'prompt', 'response_0', .*: add 'is_response_1_safe'",
        ),
        (
            {"prompt": "how?", "completion": "no", "label": True},
            "no usable preference pair: 1 whose prompt has answers of one kind alone. Found: pro",
        ),
        ({"text": "how?"}, "columns not recognised. Found: text. Expected 'chosen' and"),
    ],
)
def test_what_gives_no_pairs_is_refused_with_the_nearest_form(row, said, tmp_path):
    with pytest.raises(RecipeError, match=said) as refused:
        read_pairs(jsonl(tmp_path, row))
    assert ("Nearest" in str(refused.value)) == ("Nearest" in said)


def test_turns_with_a_tool_call_are_counted(tmp_path):
    call = {"from": "function_call", "value": "{}"}
    rows = [
        pair_of([GPT_NO, GPT_SO], conversations=turns) for turns in ([HUMAN], [HUMAN, call, HUMAN])
    ]
    pairs = read_pairs(jsonl(tmp_path, *rows))
    assert (len(pairs), pairs.left_out.reasons) == (1, {"with a tool call": 1})


def test_columns_are_reported_where_no_row_is_a_dialogue(tmp_path):
    row = pair_of(["no", "so"], ask="how?")
    with pytest.raises(RecipeError, match=r"1 without a prompt. Found: ask, chosen, rej"):
        read_pairs(jsonl(tmp_path, row))


@pytest.mark.parametrize("write", [jsonl, csv])
@pytest.mark.parametrize(("safe", "unsafe"), [("True", "False"), (True, False), (1, 0)])
def test_labels_are_read_as_text_and_as_numbers(safe, unsafe, write, tmp_path):
    answers = {"prompt": "how?", "response_0": "so", "response_1": "no"}
    labels = ("is_response_0_safe", "is_response_1_safe")
    rows = [answers | dict(zip(labels, given, strict=True)) for given in [(unsafe, safe)] * 2]
    (pair, _) = read_pairs(write(tmp_path, *rows))
    assert (pair.chosen, pair.rejected) == ("no", "so")
    for name, reason in (("is_safe", "not safe"), ("label", "not wanted")):
        rows = [
            {"prompt": "how?", "completion": answer, name: label}
            for answer, label in (("no", safe), ("so", unsafe), ("no", safe))
        ]
        found = read_answers(write(tmp_path, *rows))
        assert list(found) == [([ASKED], "no")] * 2
        assert found.left_out.reasons == {reason: 1}


def test_a_row_without_a_label_is_counted(tmp_path):
    rows = [{"prompt": "how?", "completion": "no", "label": label} for label in (True, None)]
    found = read_answers(jsonl(tmp_path, *rows))
    assert found.left_out.reasons == {"with neither true nor false for label": 1}
    # Beside other answers it may be of anything.
    found = read_answers(jsonl(tmp_path, {"prompt": "how?", "response": "no", "label": 0}))
    assert (len(found), found.unused) == (1, ["label"])


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"system_prompt": "be brief", "question": "how?", "response": "no"}, [SYSTEM, ASKED]),
        ({"prompt": [ASKED], "completion": [*TURN, NO]}, [ASKED, *TURN]),
        ({"prompt": "how?", "chosen": [ASKED, *TURN, NO]}, [ASKED, *TURN]),
        ({"messages": [ASKED, *TURN, NO], "system": "be brief"}, [SYSTEM, ASKED, *TURN]),
        ({"conversations": [HUMAN, GPT_NO], "system": "be brief"}, [SYSTEM, ASKED]),
    ],
)
def test_an_answered_prompt_has_the_whole_conversation(row, messages, tmp_path):
    file = jsonl(tmp_path, row)
    assert list(read_answers(file)) == [(messages, "no")]
    if {"messages", "conversations"} & set(row):
        assert list(read_prompts(file)) == [messages]


def test_prompts_have_their_context(tmp_path):
    rows = [
        {"Behavior": "sum it up", "ContextString": "a text", "Tags": "context"},
        {"Behavior": "sum it up", "ContextString": None, "Tags": ""},
        {"Behavior": "<|user|>\nsum it up", "ContextString": None, "Tags": ""},
    ]
    found = read_prompts(jsonl(tmp_path, *rows))
    texts = [message["content"] for (message,) in found]
    assert texts == ["a text\n\n---\n\nsum it up", "sum it up"]
    assert found.notes("set") == [
        "rows of the set left out: 1 already in a chat template",
        "columns of the set not used: Tags",
    ]
    rows = [{"prompt": "how?", "context": "they ask: how?", "system": "be brief"}]
    (messages,) = read_prompts(jsonl(tmp_path, *rows))
    assert messages == [SYSTEM, {"role": "user", "content": "they ask: how?\n\n---\n\nhow?"}]


def saved(folder, rows):
    datasets.Dataset.from_list(rows, split="test").save_to_disk(str(folder))


def saved_splits(folder, rows):
    given = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": given, "test": given}).save_to_disk(str(folder))


def one_file(folder, rows):
    tiny.write_jsonl(folder, rows)


def list_file(folder, rows):
    folder.write_text(json.dumps(rows, indent=1))


def parquet_file(folder, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(folder))


def files(folder, rows):
    folder.mkdir()
    for name in ("train", "test"):
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)


@pytest.mark.parametrize(
    ("write", "name", "splits"),
    [
        (saved, "rows", "train, test"),
        (saved_splits, "rows", "train, test"),
        (files, "rows", "train, test"),
        (one_file, "rows.jsonl", "train"),
        (list_file, "rows.json", "train"),
        (parquet_file, "rows.parquet", "train"),
    ],
)
def test_a_split_is_a_part_of_every_kind_of_source(write, name, splits, tmp_path):
    rows = tiny.preference_rows(6)
    write(tmp_path / name, rows)
    source = str(tmp_path / name)

    def chosen(split):
        return [pair.chosen for pair in read_pairs(source, split)]

    expected = [row["chosen"] for row in rows]
    assert chosen("train") == expected
    assert chosen("train[:2]") == expected[:2]
    assert chosen("train[50%:] + train[1:2]") == expected[3:] + expected[1:2]
    for split in ("validation", "validation[:2]"):
        with pytest.raises(RecipeError, match=f"no split validation; it has {splits}$"):
            read_pairs(source, split)
    with pytest.raises(RecipeError, match=r"no split train\[2"):
        read_pairs(source, "train[2")
    if "test" in splits:
        assert chosen("test[-1:]") == expected[-1:]
    if write is not files:
        with pytest.raises(RecipeError, match="has no configurations; leave math out"):
            read_pairs(source, config="math")


@pytest.fixture
def of_the_hub(monkeypatch, tmp_path):
    """The folder ``rows`` is the hub's dataset ``org/rows`` as well."""
    real = datasets.load_dataset_builder
    places = {"org/rows": str(tmp_path / "rows")}
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda path, **more: real(places.get(path, path), **more)
    )
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path)
    return "org/rows"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_is_not_needed_breaks_nothing(kind, of_the_hub, tmp_path):
    (tmp_path / "rows").mkdir()
    for name, odd in (("a", []), ("b", [{"a": 1}])):
        rows = [{**row, "odd": odd} for row in tiny.preference_rows(3)]
        if kind == "jsonl":
            tiny.write_jsonl(tmp_path / f"rows/{name}.jsonl", rows)
        else:
            parquet_file(tmp_path / f"rows/{name}.parquet", rows)
    for source in (str(tmp_path / "rows"), of_the_hub):
        pairs = read_pairs(source)
        assert (len(pairs), pairs.unused) == (6, ["odd"])


def test_a_column_may_be_null_for_long(tmp_path):
    long = [{**row, "chosen": "no " * 40_000} for row in tiny.preference_rows(100)]
    rows = [*({**row, "odd": None} for row in long), {**long[0], "odd": {"a": [1, "b"]}}]
    assert len(read_pairs(jsonl(tmp_path, *rows))) == 101


def test_a_needed_column_that_breaks_the_reading_is_named(tmp_path):
    (tmp_path / "rows").mkdir()
    for name, chosen in (("a", []), ("b", [NO])):
        parquet_file(tmp_path / f"rows/{name}.parquet", [pair_of([chosen, "so"], prompt="how?")])
    with pytest.raises(RecipeError, match=r"rows: column chosen can't be read \(TypeError\)"):
        read_pairs(str(tmp_path / "rows"))
    (tmp_path / "texts").mkdir()
    for name, odd in (("a", "x"), ("b", "y")):
        row = pair_of(["no", "so"], prompt="how?")
        (tmp_path / f"texts/{name}.csv").write_text(",".join([*row, odd]) + "\nhow?,no,so,1\n")
    with pytest.raises(RecipeError, match="texts: x, y isn't a column of each of its files"):
        read_pairs(str(tmp_path / "texts"))


def test_what_stands_in_a_csv_is_text(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nhow many?,007\nwhich?,NA\nwhat?,\n")
    found = read_answers(str(tmp_path / "rows.csv"))
    assert [answer for _, answer in found] == ["007", "NA"]
    assert found.left_out.reasons == {"without an answer": 1}


def test_a_check_names_what_is_not_used_once(family_recipe, tmp_path):
    answers = [{"prompt": "how?", "completion": "no", "label": n > 1, "id": n} for n in range(9)]
    rows = [{**row, "score": 1, "by": "x"} for row in tiny.preference_rows(9)]
    content = family_recipe(
        safety_dataset=jsonl(tmp_path, *rows),
        safety_split="train[:8]",
        utility_dataset=str(tiny.write_jsonl(tmp_path / "answers.jsonl", answers)),
    )
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    lines = tiny.invoke("mergekit-somf", "check", file).output.strip().splitlines()
    assert "  pairs:        8" in lines
    assert lines[-3:] == [
        "columns of the safety dataset not used: score, by",
        "rows of the utility dataset left out: 2 not wanted",
        "columns of the utility dataset not used: id",
    ]
    file = tiny.write_recipe(
        tmp_path / "recipe.yml",
        content | {"parameters": {**content["parameters"], "safety_split": "test"}},
    )
    result = tiny.invoke("mergekit-somf", "check", file)
    assert "rows.jsonl has no split test; it has train" in " ".join(result.output.split())
