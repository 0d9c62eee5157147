"""What strangers give is data: none of it is run, and none of the harmful text in it is shown."""

import ast
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import matplotlib.text
import pytest
import tiny
from PIL import Image

import somf_mergekit
from somf_mergekit import RecipeError
from somf_mergekit.data.chat import prompt_ids, user_prompt
from somf_mergekit.data.dataset_reading import dataset_rows
from somf_mergekit.data.pairs import read_pairs
from somf_mergekit.evaluate.sweep.variants import file_name
from somf_mergekit.learner import passes

PACKAGE = Path(somf_mergekit.__file__).parent

# Modules that make objects of bytes, or code of text, and calls that do.
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jinja2", "runpy"}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "string.Template", "ast.literal_eval"),
}
# In torch and accelerate, what takes objects unpickles those of other processes: those of one
# training run, which one module talks to.
OF_OBJECTS = ("_object", "_object_list")
OF_ONE_RUN = {"gather_object", "broadcast_object_list"}


def faults_of(source):
    """Return what of a module's source could make something run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in ([module] if module else names)}
            found += sorted(roots & NEVER_IMPORTED)
            found += [name for name in names if name.endswith(OF_OBJECTS)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in NEVER_CALLED or called.endswith(OF_OBJECTS):
            found.append(called)
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg in ("allow_pickle", "shell") and value != "False":
                found.append(f"{called}({keyword.arg}=...)")
            if keyword.arg == "weights_only" and value != "True":
                found.append(f"{called}(weights_only=...)")
            if keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant):
                found.append(f"{called}(trust_remote_code={value})")
    return found


def test_no_module_unpickles_or_runs_what_it_reads():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    # That one reads constants in a package's source, and runs none of it.
    allowed = {"process_group.py": OF_ONE_RUN, "phrase_judges.py": {"ast.literal_eval"}}
    for file in files:
        assert set(faults_of(file.read_text())) <= allowed.get(file.name, set()), file


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib.numpy_pickle import load",
        "from accelerate.utils import gather_object",
        "torch.distributed.all_gather_object(a, b)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=x)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_what_would_is_found(source):
    assert faults_of(source)


def test_code_that_comes_with_a_model_or_its_data_is_not_run(family, tmp_path):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("base", "math", "code"):
        shutil.copytree(family / name, tmp_path / name)
        (tmp_path / name / "own.py").write_text(code)
        for file, auto_map in (
            ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        ):
            path = tmp_path / name / file
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    # datasets once ran the script that is named as its folder.
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/pairs.py").write_text(code)
    shutil.copy(family / "pairs.jsonl", tmp_path / "pairs/train.jsonl")
    models = [tmp_path / "math", tmp_path / "code"]
    for source in ("pairs", "pairs/train.jsonl"):
        content = tiny.recipe(
            tmp_path / "base",
            models,
            safety_dataset=str(tmp_path / source),
            pairs_eval=str(family / "pairs.jsonl"),
            max_steps=1,
            batch_size=4,
            max_length=48,
        )
        file = tiny.write_recipe(tmp_path / "recipe.yml", content)
        result = tiny.invoke("mergekit-yaml", file, tmp_path / f"out-{source[5:6]}")
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert not ran.exists()
        # Nor was it asked whether it may be run.
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        assert signal.alarm(0) == 0
    assert result.exit_code == 0, result.output


def led_by_readme(folder, outside):
    tiny.write_jsonl(folder / "train.jsonl", tiny.preference_rows(3))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: a\n  data_files: {outside}\n---"
    )


def led_by_state(folder, outside):
    datasets.Dataset.from_list(tiny.preference_rows(3)).save_to_disk(str(folder))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": outside}]}))


@pytest.mark.parametrize("lead", [led_by_readme, led_by_state])
@pytest.mark.parametrize("outside", ["../rows.jsonl", "{}/rows.jsonl", "https://x.invalid/y.jsonl"])
def test_a_dataset_leads_to_no_file_outside_of_it(lead, outside, tmp_path):
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.preference_rows(3))
    (tmp_path / "data").mkdir()
    lead(tmp_path / "data", outside.format(tmp_path))
    with pytest.raises(RecipeError, match=r"as its data, which is not in it|can't be read"):
        dataset_rows(str(tmp_path / "data"))


def test_a_folder_may_be_named_by_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    tiny.write_jsonl(tmp_path / "data/train.jsonl", tiny.preference_rows(3))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(dataset_rows(str(tmp_path / "link"))) == 3


def test_a_dataset_of_the_hub_leads_to_no_file_of_this_machine(monkeypatch):
    files = {"train": ["hf://datasets/a/b@0/train.jsonl", "/etc/hosts"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(RecipeError, match="a/b: it names /etc/hosts as its data"):
        dataset_rows("a/b")


@pytest.mark.parametrize("label", ["safety_dataset=../../x", "/etc/x", "..", "a=\x00\n/../b"])
def test_a_value_that_is_swept_over_names_no_other_folder(label):
    name = f"{file_name(label)}-0"
    assert Path(name).name == name
    assert name.isprintable()


def test_a_row_opens_no_file_that_it_names(tmp_path):
    (tmp_path / "named").write_text("no image")
    rows = [{**row, "picture": str(tmp_path / "named")} for row in tiny.preference_rows(3)]
    text = dict.fromkeys(rows[0], datasets.Value("string"))
    for kind in (datasets.Image(), [datasets.Image()], {"a": datasets.Image()}):
        values = [row["picture"] for row in rows]
        if isinstance(kind, list):
            values = [[value] for value in values]
        elif isinstance(kind, dict):
            values = [{"a": value} for value in values]
        columns = {key: [row[key] for row in rows] for key in text} | {"picture": values}
        made = datasets.Dataset.from_dict(
            columns, features=datasets.Features({**text, "picture": kind})
        )
        made.to_parquet(str(tmp_path / "rows.parquet"))
        found = read_pairs(str(tmp_path / "rows.parquet"))
        assert (len(found), found.unused) == (3, ["picture"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no: ' + messages[0]['content']) }}",
    ],
)
def test_a_template_runs_no_code_and_reports_no_text(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tiny_tokenizer(chat_template=template)
    with pytest.raises(RecipeError, match="chat template refuses") as error:
        prompt_ids(tokenizer, user_prompt("kanari wants a cake"))
    assert "kanari" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


HARM = "kanari"


def harmful_rows(count):
    """Pairs that have a word in every text, which nothing else has."""
    return [
        {key: f"{HARM} {text}" for key, text in row.items()} for row in tiny.preference_rows(count)
    ]


def assert_not_told(folder, *reported):
    """Look for the word in what was said and in all files of a merge."""
    for text in reported:
        assert HARM not in text.lower()
    for file in folder.rglob("*"):
        if file.is_file():
            assert HARM.encode() not in file.read_bytes().lower(), file
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            assert not [text for text in image.info.values() if HARM in str(text)]


@pytest.fixture
def drawn(monkeypatch):
    """The texts of all figures."""
    found, real = [], matplotlib.text.Text.set_text

    def set_text(self, text):
        found.append(str(text))
        real(self, text)

    monkeypatch.setattr(matplotlib.text.Text, "set_text", set_text)
    return found


@pytest.mark.slow
def test_no_text_of_the_data_is_in_any_file_message_or_figure(
    family_recipe, tmp_path, drawn, monkeypatch, caplog
):
    monkeypatch.setenv("SOMF_REPORT", "full")
    monkeypatch.setenv("SOMF_CHECKPOINT_MINUTES", "0")
    rows = harmful_rows(60)
    for place, key in ((3, "chosen"), (4, "rejected"), (5, "prompt")):
        rows[place][key] = ""
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    answers = [{"prompt": row["prompt"], "answer": row["rejected"]} for row in harmful_rows(6)]
    skill = tiny.write_jsonl(tmp_path / "answers.jsonl", answers)
    content = family_recipe(
        safety_dataset=str(pairs),
        utility_dataset=str(skill),
        safety_eval=str(skill),
        harmless_eval=str(skill),
        pairs_eval=str(pairs),
        skill_eval=f"skill={skill}",
        max_steps=40,
        epochs=9,
    )
    file = tiny.write_recipe(tmp_path / "recipe.yml", content)
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "made/out")
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "made").rglob("*")}
    assert {"report.md", "report.json", "report.png", "somf.json", "README.md"} <= written
    assert drawn
    assert "left out" in result.output
    assert_not_told(tmp_path / "made", result.output, caplog.text, *drawn)
    # Where learning goes bad, rows are named by their numbers.
    real = passes.preference_losses

    def broken(*arguments):
        losses, margins = real(*arguments)
        return losses * float("nan"), margins

    monkeypatch.setattr(passes, "preference_losses", broken)
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "bad/mask")
    assert "the loss became NaN or infinite at step 1" in result.output
    assert re.search(r"on row \d+", result.output)
    assert_not_told(tmp_path / "bad", result.output, caplog.text)


BAD = {
    "cut.jsonl": '{"prompt": "kanari", "chosen": "kanari", "rejected": "b"}\n{"prompt": "kanari',
    "word.jsonl": '{"prompt": kanari}',
    "mixed.jsonl": '{"prompt": 1}\n' * 9 + '{"prompt": ["kanari"]}\n{"prompt": {"kanari": 1}}',
    "top.json": '"kanari"',
    "ragged.csv": "prompt,chosen,rejected\nkanari,a,b\nkanari,kanari,b,kanari,kanari\n",
    "typed.csv": "prompt,chosen,rejected\n" + "1,2,2\n" * 20_000 + "kanari,kanari,kanari\n",
    "equal.jsonl": '{"prompt": "kanari", "chosen": "kanari", "rejected": "kanari"}',
    "parts.jsonl": '{"prompt": ["kanari"], "chosen": "kanari", "rejected": {"a": "kanari"}}',
}


@pytest.mark.parametrize("name", BAD)
def test_no_text_of_data_that_is_wrong_is_reported(name, family_recipe, tmp_path, capfd, caplog):
    datasets.disable_progress_bars()
    (tmp_path / name).write_text(BAD[name])
    file = tmp_path / "recipe.yml"
    tiny.write_recipe(file, family_recipe(safety_dataset=str(tmp_path / name)))
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert_not_told(tmp_path / "none", result.output, caplog.text, *capfd.readouterr())
