"""Every mistake ends in one message that says what, where and what to do; nothing is lost."""

import json
import shutil

import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file


@pytest.fixture
def refused(tmp_path):
    """Run a recipe that is wrong; return the message."""

    def run(content, *options, command=("mergekit-yaml",), out="out", further=()):
        file = tmp_path / "recipe.yml"
        tiny.write_recipe(file, content)
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        (folder / "kept.txt").write_text("what was there")
        result = tiny.invoke(*command, file, folder, *options)
        assert result.exit_code == 1, result.output
        # Anything but a clean exit would end in a traceback at the command line.
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Error: " in result.output
        assert "Traceback" not in result.output
        assert sorted(p.name for p in folder.iterdir()) == ["kept.txt", *further]
        assert (folder / "kept.txt").read_text() == "what was there"
        return " ".join(result.output.split("Error: ", 1)[1].split())

    return run


def test_a_device_that_is_not_there_is_reported_with_the_rest(refused, family_recipe):
    for name in ("abacus", *(() if torch.cuda.is_available() else ("cuda",))):
        said = refused(family_recipe(batch_size=0), "--device", name)
        assert f"device '{name}' can't be used: " in said
        assert "parameters.batch_size: 0 is not" in said


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"learnin_rate": 0.1}, "learnin_rate: unknown parameter (did you mean 'learning_rate'?)"),
        ({"totally_else": 1}, "parameters.totally_else: unknown parameter"),
        ({"batch_size": 0}, "parameters.batch_size: 0 is not a whole number >= 1"),
        ({"batch_size": 2.5}, "parameters.batch_size: 2.5 is not a whole number >= 1"),
        ({"batch_size": True}, "parameters.batch_size: True is not a whole number >= 1"),
        ({"learning_rate": -1}, "parameters.learning_rate: -1 is not a number > 0 and <= 100"),
        ({"learning_rate": "fast"}, "parameters.learning_rate: 'fast' is not a number"),
        ({"temperature": 0}, "parameters.temperature: 0 is not a number > 0 and <= 10"),
        ({"mask_kind": "hard"}, "'hard' is not `soft` or `binary` or `sampled`"),
        ({"mask_kind": ["soft", "hard"]}, "'hard' is not `soft` or `binary` or `sampled`"),
        ({"reference": "other"}, "'other' is not `base` or `merged` or `redrawn`"),
        ({"max_steps": [1, 2]}, "max_steps: takes one value for all tensors"),
        ({"fusion": "task_arithmetics"}, "is known (did you mean 'task_arithmetic'?); known are"),
        ({"safety_dataset": None}, "parameters.safety_dataset is missing"),
        ({"safety_dataset": 7}, "parameters.safety_dataset: 7 is not text"),
        ({"mask": "somewhere"}, "safety_dataset are both given"),
        ({"include": "no_such_tensor"}, "leave no changed tensor for a mask"),
        ({"safety_dataset": "./nothing.jsonl"}, "./nothing.jsonl: no such file or folder"),
        ({"safety_dataset": "nobody/nothing"}, "nobody/nothing (split train) can't be read"),
        ({"safety_dataset": None, "mask": "./nothing"}, "mask ./nothing: no such mask"),
    ],
)
def test_parameters(refused, family_recipe, parameters, said):
    assert said in refused(family_recipe(**parameters))


def test_all_mistakes_are_reported_together(refused, family_recipe):
    recipe = family_recipe(batch_size=0, learnin_rate=1)
    recipe["models"][0]["parameters"]["epochs"] = 3
    recipe["models"][1]["parameters"]["wieght"] = 3
    recipe["chat_templat"] = "x"
    del recipe["base_model"]
    message = refused(recipe)
    assert "6 problems" in message
    for said in (
        "chat_templat: unknown key (did you mean 'chat_template'?)",
        "base_model is missing",
        "parameters.batch_size: 0",
        "parameters.learnin_rate: unknown",
        "models[0].parameters.epochs: belongs to the recipe as a whole",
        "models[1].parameters.wieght: unknown parameter (did you mean 'weight'?)",
    ):
        assert said in message


def test_missing_weight(refused, family_recipe, family):
    recipe = family_recipe()
    del recipe["models"][1]["parameters"]
    message = refused(recipe)
    assert f"weight is missing for {family / 'code'}" in message
    assert str(family / "math") not in message


def test_no_model_beside_the_base(refused, family_recipe, family):
    recipe = family_recipe()
    recipe["models"] = [{"model": str(family / "base")}]
    assert "at least one fine-tuned model" in refused(recipe)


def test_model_that_is_not_there(refused, family_recipe):
    recipe = family_recipe()
    recipe["models"][0]["model"] = "/nowhere/model"
    assert "model /nowhere/model: there is no such folder" in refused(recipe)


def test_adapter_without_a_cache(refused, family_recipe, family):
    recipe = family_recipe()
    recipe["models"][0]["model"] = f"{family / 'base'}+{family / 'math'}"
    assert "--lora-merge-cache" in refused(recipe)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "data.jsonl"),
        ([{"question": "a", "answer": "b"}], "columns not recognised. Found: question, answer"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "1 with chosen equal to rejected"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], "no usable preference pair"),
    ],
)
def test_safety_data(refused, family_recipe, tmp_path, rows, said):
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    assert said in refused(family_recipe(safety_dataset=str(tmp_path / "data.jsonl")))


def test_unreadable_safety_data_and_wrong_shapes_are_reported_together(
    refused, family_recipe, tmp_path
):
    tokenizer = tiny.tiny_tokenizer()
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer), hidden=48), tokenizer, tmp_path / "wide")
    recipe = family_recipe(safety_dataset="./nothing.jsonl")
    recipe["models"][0]["model"] = str(tmp_path / "wide")
    message = refused(recipe)
    assert "no such file or folder" in message
    assert "self_attn.q_proj.weight: shape 48x48" in message
    assert "32x32 in the base" in message


def given_or_learned(given, family_recipe, folder):
    """A recipe that is given a mask learned before, or one that learns its own."""
    if not given:
        return family_recipe()
    learned = tiny.write_recipe(folder / "first.yml", family_recipe(max_steps=0))
    assert tiny.invoke("mergekit-somf", "learn", learned, folder / "mask").exit_code == 0
    return family_recipe(safety_dataset=None, mask=str(folder / "mask"))


@pytest.mark.parametrize("given", [False, True], ids=["learning", "mask given"])
def test_another_vocabulary(refused, family_recipe, family, tmp_path, given):
    tokenizer = tiny.tiny_tokenizer(extra_tokens=["<x>", "<y>"])
    tokenizer.add_tokens(["<z>"])
    model = tiny.tiny_llama(1, len(tokenizer))
    tiny.save_model(model, tokenizer, tmp_path / "longer")
    recipe = given_or_learned(given, family_recipe, tmp_path)
    recipe["models"][0]["model"] = str(tmp_path / "longer")
    message = refused(recipe)
    base = len(tiny.tiny_tokenizer())
    assert f"model.embed_tokens.weight: shape {len(tokenizer)}x32" in message
    assert f"{base}x32 in the base" in message
    assert "tokenizer: {source: base}" in message


def test_another_number_of_layers(refused, family_recipe, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer), layers=3), tokenizer, tmp_path / "deep")
    recipe = family_recipe()
    recipe["models"][0]["model"] = str(tmp_path / "deep")
    assert "same number of layers" in refused(recipe)


def test_all_task_vectors_zero(refused, family_recipe, family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "same")
    recipe = family_recipe()
    for model in recipe["models"]:
        model["model"] = str(tmp_path / "same")
    recipe["models"] = recipe["models"][:1]
    assert "changes nothing, all of its task vectors are zero" in refused(recipe)


def cut_short(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def without_weights(model):
    (model / "model.safetensors").unlink()


def in_shards(model, **places):
    """Name the shards of a model's tensors in an index, as large models do."""
    places = dict.fromkeys(tiny.tensors_of(model), "one.safetensors") | places
    (model / "model.safetensors").rename(model / "one.safetensors")
    index = json.dumps({"weight_map": places})
    (model / "model.safetensors.index.json").write_text(index)


def shard_missing(model):
    in_shards(model, **{"lm_head.weight": "two.safetensors"})


def shard_without_the_tensor(model):
    tensors = tiny.tensors_of(model)
    in_shards(model)
    del tensors["lm_head.weight"]
    save_file(tensors, model / "one.safetensors", metadata={"format": "pt"})


def index_that_is_none(model):
    in_shards(model)
    (model / "model.safetensors.index.json").write_text("[1, 2")


@pytest.mark.parametrize("given", [False, True], ids=["learning", "mask given"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "its weights can't be opened"),
        (without_weights, "its weights can't be opened: Unable to find model files"),
        (shard_missing, "two.safetensors can't be read"),
        (shard_without_the_tensor, "lm_head.weight is not in"),
        (index_that_is_none, "its weights can't be opened"),
    ],
)
def test_damaged_checkpoints(refused, family_recipe, family, tmp_path, damage, said, given):
    shutil.copytree(family / "math", tmp_path / "broken")
    damage(tmp_path / "broken")
    recipe = given_or_learned(given, family_recipe, tmp_path)
    recipe["models"][0]["model"] = str(tmp_path / "broken")
    message = refused(recipe)
    assert f"model {tmp_path / 'broken'}: " in message
    assert said in message


def test_float8_needs_a_dtype_to_merge_in(refused, family_recipe, family, tmp_path):
    recipe = family_recipe()
    for model in ("base", "math", "code"):
        shutil.copytree(family / model, tmp_path / model)
        tensors = {n: t.to(torch.float8_e4m3fn) for n, t in tiny.tensors_of(family / model).items()}
        save_file(tensors, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
    recipe = json.loads(json.dumps(recipe).replace(str(family), str(tmp_path)))
    recipe["parameters"]["safety_dataset"] = str(family / "pairs.jsonl")
    stored = {key: value for key, value in recipe.items() if key != "dtype"}
    assert "is stored in float8: set `dtype: bfloat16`" in refused(stored)
    found = tiny.merged(recipe, tmp_path / "merged")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_quantized_models(refused, family_recipe, family, tmp_path):
    shutil.copytree(family / "math", tmp_path / "quantized")
    file = tmp_path / "quantized/config.json"
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": method}))
    recipe = family_recipe()
    recipe["models"][0]["model"] = str(tmp_path / "quantized")
    assert f"model {tmp_path / 'quantized'}: it is quantized" in refused(recipe)


def test_whole_numbers_that_differ(refused, family_recipe, family, tmp_path):
    name = "model.norm.weight"
    recipe = family_recipe()
    del recipe["dtype"]
    for number, model in enumerate(["base", "math", "code"]):
        shutil.copytree(family / model, tmp_path / model)
        tensors = tiny.tensors_of(tmp_path / model)
        tensors[name] = torch.full((32,), number)
        save_file(tensors, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
    recipe = json.loads(json.dumps(recipe).replace(str(family), str(tmp_path)))
    recipe["parameters"]["safety_dataset"] = str(family / "pairs.jsonl")
    assert f"{name} holds whole numbers, which can't be fused" in refused(recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("given", [False, True], ids=["learning", "mask given"])
def test_weights_that_are_not_finite(refused, family_recipe, family, tmp_path, value, given):
    shutil.copytree(family / "math", tmp_path / "broken")
    tensors = tiny.tensors_of(tmp_path / "broken")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    recipe = given_or_learned(given, family_recipe, tmp_path)
    recipe["models"][0]["model"] = str(tmp_path / "broken")
    if given:
        recipe["parameters"]["mask_transfer"] = True
    # A given mask is put beside the merge before mergekit reads the first weight.
    message = refused(recipe, further=["somf"] if given else [])
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert str(tmp_path / "broken") in message
    assert "NaN or infinite" in message


def test_a_loss_that_is_not_finite_keeps_the_last_good_mask(family_recipe, tmp_path, monkeypatch):
    from somf_mergekit import MaskSet
    from somf_mergekit.learner import passes, tensors

    real, calls = passes.preference_losses, []

    def broken(*arguments):
        calls.append(1)
        losses, margins = real(*arguments)
        return (losses * float("nan") if len(calls) == 3 else losses), margins

    monkeypatch.setattr(passes, "preference_losses", broken)
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe(max_steps=5))
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
    assert result.exit_code == 1
    assert "NaN or infinite at step 3 of 5" in result.output
    assert not (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/somf").exists()
    remaining = MaskSet.open(tmp_path / "out/somf.last-good")
    assert remaining.provenance["steps"] == 2

    # Two steps of the same schedule end in the mask that was stored.
    class Stop(Exception):
        pass

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return real(*arguments)

    calls.clear()
    monkeypatch.setattr(passes, "preference_losses", stopping)
    logits = {}
    original = tensors.MaskedTensor.update

    def update(self, *arguments):
        original(self, *arguments)
        logits[self.name] = self.whole().clone()

    monkeypatch.setattr(tensors.MaskedTensor, "update", update)
    assert isinstance(tiny.invoke("mergekit-yaml", file, tmp_path / "again").exception, Stop)
    for name in remaining.names():
        error = (remaining.probabilities(name) - torch.sigmoid(logits[name])).abs().max()
        assert error < 1 / 400


def test_mask_of_another_model(refused, family_recipe, tmp_path, family):
    tokenizer = tiny.tiny_tokenizer()
    wide = tiny.tiny_llama(0, len(tokenizer), hidden=48)
    tiny.save_model(wide, tokenizer, tmp_path / "wide")
    tiny.save_model(tiny.perturbed(wide, 1), tokenizer, tmp_path / "wide-math")
    other = tiny.recipe(
        tmp_path / "wide",
        [tmp_path / "wide-math"],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=0,
        max_length=48,
    )
    file = tiny.write_recipe(tmp_path / "first.yml", other)
    assert tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask").exit_code == 0
    message = refused(family_recipe(safety_dataset=None, mask=str(tmp_path / "mask")))
    assert "model.norm.weight: the mask in" in message
    assert "has shape (48,), the weight (32,): the mask is of another model" in message


def test_output_folder_that_can_not_be_written(family_recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    result = tiny.invoke("mergekit-yaml", file, tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "can't be written" in result.output
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_with_other_files_is_left_alone(family_recipe, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("long")
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    result = tiny.invoke("mergekit-somf", "learn", file, tmp_path / "thesis")
    assert result.exit_code == 1
    assert "holds files but no mask" in result.output
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_without_a_mask_in_memory(family):
    from mergekit.merge_methods import merge_state_dicts

    from somf_mergekit import RecipeError, register

    register()
    models = {name: tiny.tensors_of(family / name) for name in ("base", "math")}
    with pytest.raises(RecipeError, match="Learn one first"):
        merge_state_dicts(models, "somf", base="base", parameters={"weight": 1.0})


def test_machine_setting_that_makes_no_sense(refused, family_recipe, monkeypatch):
    monkeypatch.setenv("SOMF_MICRO_BATCH_SIZE", "many")
    assert "SOMF_MICRO_BATCH_SIZE" in refused(family_recipe())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "can't be read"),
        ("- 1", "a recipe is a mapping"),
        ("merge_method: linear\nmodels: [{model: x}]\n", "expected 'somf'"),
        ("merge_method: somf\n", "Exactly one of"),
        ("models: [{model: x}]\n", "merge_method: Field required"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "learn", "check"])
def test_recipes_that_are_none(tmp_path, text, said, command):
    (tmp_path / "recipe.yml").write_text(text)
    folder = [] if command == "check" else [tmp_path / "out"]
    result = tiny.invoke("mergekit-somf", command, tmp_path / "recipe.yml", *folder)
    assert result.exit_code == 1
    assert said in result.output
    assert isinstance(result.exception, SystemExit)


def test_the_console_script_prints_no_traceback(family_recipe, tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(family_recipe(batch_size=0)))
    result = tiny.merge(file, tmp_path / "out")
    assert result.returncode == 1
    assert "Error: This recipe is not right: parameters.batch_size: 0" in result.stderr
    assert "Traceback" not in result.stderr
