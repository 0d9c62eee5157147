"""What this package relies on in mergekit, transformers, datasets and torch, a fact a test.

An incompatible release fails here with a sentence: what is relied on, in which of our modules, and
what breaks without it. What must be there at all is in ``somf_mergekit.contracts``, which a merge
looks at too; here is also how it must behave.
"""

import inspect
import json
import os
import sys

import datasets
import pytest
import tiny
import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, ConfigYamlDumper, MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from somf_mergekit import contracts, fusion_methods, fusions
from somf_mergekit.contracts import CONTRACTS, LEARNING, MERGING, Contract, check_contracts
from somf_mergekit.errors import RecipeError

SHAPE = (6, 8)


@pytest.fixture
def broken(monkeypatch):
    """Add a contract that no release keeps."""
    lost = Contract("mergekit.plan", "MergePlanner", "is asked for the plan", has=("lost",))
    monkeypatch.setattr(contracts, "CONTRACTS", (*CONTRACTS, lost))
    contracts.contract_problems.cache_clear()
    yield "mergekit.plan.MergePlanner.lost"
    contracts.contract_problems.cache_clear()


# The table that a merge looks at.


@pytest.mark.parametrize(
    "contract", CONTRACTS, ids=lambda c: f"{c.module}.{c.name}-{c.used_for[:20]}"
)
def test_what_the_package_needs_is_there(contract):
    assert contract.missing() is None, (
        f"{contract.package} {contracts.installed(contract.package)} has no {contract.missing()}, "
        f"which {contract.used_for}"
    )


@pytest.mark.parametrize(
    ("contract", "missing"),
    [
        (Contract("mergekit.lost", "x", "y"), "mergekit.lost.x"),
        (Contract("mergekit.plan", "lost", "y"), "mergekit.plan.lost"),
        (
            Contract("mergekit.plan", "MergePlanner", "y", has=("_plan", "lost")),
            "mergekit.plan.MergePlanner.lost",
        ),
        (
            Contract("mergekit.plan", "MergePlanner", "y", takes=("config", "lost")),
            "an argument lost of mergekit.plan.MergePlanner",
        ),
    ],
)
def test_what_is_missing_is_named(contract, missing):
    assert contract.missing() == missing


def test_a_merge_with_another_mergekit_ends_in_a_sentence(broken, family_recipe, tmp_path):
    message = tiny.refused(family_recipe(), tmp_path)
    version = contracts.installed("mergekit")
    assert message.startswith(f"{contracts.HEADING}: mergekit {version} has no {broken}, which is")
    assert message.endswith("supported is mergekit<0.2,>=0.1.5")


def test_the_own_command_with_another_mergekit_ends_in_a_sentence(broken, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", {"merge_method": "linear"})
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == 1
    assert broken in result.output


def test_learning_looks_at_what_learning_needs(monkeypatch, family_recipe, tmp_path):
    lost = Contract("transformers.initialization", "lost", "makes a model", when=LEARNING)
    monkeypatch.setattr(contracts, "CONTRACTS", (lost,))
    contracts.contract_problems.cache_clear()
    check_contracts(MERGING)
    message = tiny.refused(family_recipe(), tmp_path)
    contracts.contract_problems.cache_clear()
    assert "has no transformers.initialization.lost, which makes a model" in message


def test_a_package_that_is_not_asked_for_has_no_range():
    assert contracts.installed("no-such-package") == "(not installed)"
    assert contracts.supported("no-such-package") == "another version of no-such-package"


# mergekit: merge methods.


def group(name="w", models=2, **tensors):
    draw = torch.Generator().manual_seed(1)
    made = [tensors.get(f"t{i}", torch.randn(SHAPE, generator=draw)) for i in range(models + 1)]
    entries = [TensorEntry("base", made[0], True)]
    entries += [TensorEntry(f"m{i}", t) for i, t in enumerate(made[1:])]
    return TensorGroup(tuple(entries), TensorMetadata(name=name))


def fused(fusion, given, models=2, **parameters):
    of_model = {"weight", "density", "gamma"}
    values = {
        k: {f"m{i}": v for i in range(models)} if k in of_model and not isinstance(v, dict) else v
        for k, v in parameters.items()
    }
    return fusions.fused(given, {"fusion": fusion, "seed": 0, **values})


def test_methods_are_singletons_found_by_name():
    assert registry.get("ties") is registry.get("ties")
    assert registry.get("ties") in set(registry.registered_methods()), (
        "fusion_methods.py keeps what it has found of mergekit's methods under the tuple of them: "
        "they must be hashable and stay the same objects"
    )
    with pytest.raises(ValueError, match="already registered"):
        registry.register(registry.get("ties"))
    with pytest.raises(RuntimeError, match="Unimplemented"):
        registry.get("no such method")


def test_the_fusions_that_are_treated_apart_are_there():
    named = {*fusions.SUMS, *fusions._LINEAR_WHEN_DENSE, *fusions._RANDOMLY_DROPPED}
    assert named <= set(fusion_methods.known_fusions()), (
        "fusions.py learns through these in closed form; under another name they would be slow"
    )


def test_a_parameter_without_default_is_required_and_checks_its_values():
    spec = ParameterSpec("x", float, ParameterScope.SHARED)
    assert spec.required
    assert not ParameterSpec("x", float | None, ParameterScope.SHARED, None).required, (
        "plan_check.py tells what a recipe lacks by ParameterSpec.required"
    )
    with pytest.raises(ValueError, match="float"):
        spec.validate("much")


def test_a_contract_tells_how_many_models_a_method_takes():
    slerp = registry.get("slerp").spec.contract
    slerp.validate_ids(["base", "m0"], "base")
    with pytest.raises(ValueError, match=r"at most|exactly"):
        slerp.validate_ids(["base", "m0", "m1"], "base")
    assert registry.get("linear").spec.contract.base is BasePolicy.IGNORED, (
        "fusion_methods.takes_base leaves the base out for methods that ignore it"
    )


def test_sums_are_the_same_for_every_entry():
    """weights.py learns through these as W = start + D c; sums.py asks for a and c by units."""
    given = group()
    base, one, two = given.tensors
    of_task = fused("task_arithmetic", given, weight={"m0": 0.3, "m1": 0.7})
    expected = base + 0.3 * (one - base) + 0.7 * (two - base)
    assert torch.allclose(of_task, expected, atol=1e-6), (
        "task_arithmetic is base + sum of weight times task vector, without normalising"
    )
    averaged = fused("linear", given, weight={"m0": 1.0, "m1": 3.0})
    assert torch.allclose(averaged, (one + 3 * two) / 4, atol=1e-6), (
        "linear is the mean of the models by their weights, the base left out"
    )


@pytest.mark.parametrize("fusion", fusions._LINEAR_WHEN_DENSE)
def test_dense_fusions_are_linear_in_a_shared_factor(fusion):
    given, factor = group(), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) + 0.5
    values = {"weight": 0.5, "density": 1.0}
    start = fused(fusion, fusions.masked_group(given, torch.zeros(())), **values)
    whole = fused(fusion, given, **values) - start
    masked = fused(fusion, fusions.masked_group(given, factor), **values)
    assert torch.allclose(masked, start + whole * factor, atol=1e-5), (
        f"weights.py learns through {fusion} at density 1 as start + D c: a sign election is not "
        "turned by a positive factor that the models share"
    )


@pytest.mark.parametrize("fusion", fusions._RANDOMLY_DROPPED)
def test_dare_without_rescale_drops_whatever_the_factor(fusion):
    given, factor = group(), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) + 0.5
    values = {"weight": {"m0": 0.5, "m1": 0.5}, "density": 0.5, "rescale": False}
    base = given.base.tensor
    whole = fused("dare_linear", given, **values) - base
    masked = fused("dare_linear", fusions.masked_group(given, factor), **values) - base
    assert torch.allclose(masked, whole * factor, atol=1e-5), (
        f"fusions.is_linear takes {fusion} without rescale for linear: which entries are dropped "
        "depends on the seed alone"
    )


@pytest.mark.parametrize("fusion", ["dare_linear", "dare_ties", "della_linear"])
def test_random_fusions_draw_from_torchs_own_generator(fusion):
    given, values = group(), {"weight": 0.5, "density": 0.5}
    one, same = fused(fusion, given, **values), fused(fusion, given, **values)
    assert torch.equal(one, same), "fusions.fused seeds torch's generator for each tensor"
    other = fused(fusion, group(name="another"), **values)
    assert not torch.equal(one, other), (
        f"{fusion} draws elsewhere than from torch.default_generator: a merge and the learning of "
        "its mask would not drop the same entries"
    )


def test_ties_keeps_the_largest_entries_rounded_down():
    base, vector = torch.zeros(SHAPE), torch.arange(1.0, 49.0).view(SHAPE)
    given = group(models=1, t0=base, t1=vector)
    method = registry.get("ties")
    (found,) = method(
        (given,),
        parameters={"weight": {"m0": 1.0}, "density": {"m0": 0.2}},
        dtype=torch.float32,
    )
    assert int((found != 0).sum()) == int(0.2 * 48)
    assert float(found[found != 0].min()) == 48 - int(0.2 * 48) + 1, (
        "trimming.py stands for mergekit's trim: the int(density * n) largest entries, not rescaled"
    )


@pytest.mark.parametrize("fusion", ["ties", "dare_ties", "breadcrumbs", "della", "sce", "slerp"])
def test_gradients_go_through_mergekits_methods(fusion):
    models = 1 if fusion == "slerp" else 2
    given = group(models=models)
    factor = torch.ones(SHAPE, requires_grad=True)
    values = {"t": 0.4} if fusion == "slerp" else {"weight": 0.5}
    result = fused(fusion, fusions.masked_group(given, factor), models, **values)
    assert result.requires_grad, (
        f"weights.FusedWeight differentiates {fusion} by autograd: mergekit must not detach"
    )


def test_a_method_gets_its_inputs_in_the_type_that_is_asked_for():
    given = group(t0=torch.ones(SHAPE, dtype=torch.bfloat16), t1=torch.ones(SHAPE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused("task_arithmetic", given, weight=0.5)
    assert result.dtype == torch.float32, (
        "fusions.fused computes in float32 whatever the models are in, and under autocast too"
    )


# mergekit: plan, graph, files.


@pytest.fixture
def planned(family, family_recipe):
    """What mergekit's own planner makes of a recipe of its own method."""

    def make(tokenizer=None, parameters=None):
        recipe = family_recipe() | {"merge_method": "task_arithmetic"}
        recipe["parameters"] = parameters or {}
        if tokenizer:
            recipe["tokenizer"] = {"source": tokenizer}
        config = MergeConfiguration.model_validate(recipe)
        options = MergeOptions(quiet=True)
        LoaderCache().setup(options=options)
        planner = MergePlanner(
            config,
            get_architecture_info(config, options),
            options,
            ModelReference.parse(str(family / "base")).config(),
        )
        return planner, planner.plan_to_disk(str(family / "out"))

    return make


def test_the_plan_is_made_in_a_step_of_its_own(monkeypatch, planned):
    original = MergePlanner._plan

    def first_alone(self):
        original(self)
        self._tensors = self._tensors[:1]

    monkeypatch.setattr(MergePlanner, "_plan", first_alone)
    _, targets = planned()
    tensors = [t for t in targets if hasattr(t, "tensor_task")]
    assert len(tensors) == 1, (
        "planner.py hands each tensor its mask after MergePlanner._plan, in _tensors: plan_to_disk "
        "must call it and take them from there"
    )


def test_the_plan_has_each_tensor_with_its_task(planned, family):
    planner, _ = planned()
    for weight, task in planner._tensors:
        inner = task.gather_tensors
        assert isinstance(inner, GatherTensors)
        assert set(inner.weight_info.keys()) == set(task.model_order)
        assert task.base_model == ModelReference.parse(str(family / "base"))
        assert task.output_weight is weight
    assert planner._tokenizer_task is None
    assert planner.config.modules, "provenance and checks read the plan's own recipe"


def test_vocabularies_are_aligned_around_the_reading_of_a_tensor(planned):
    planner, _ = planned(tokenizer="base")
    aligned = [w.name for w, t in planner._tensors if isinstance(t.gather_tensors, GatherTensors)]
    wrapped = {
        w.name: t.gather_tensors
        for w, t in planner._tensors
        if not isinstance(t.gather_tensors, GatherTensors)
    }
    assert set(wrapped) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert aligned
    for task in wrapped.values():
        assert isinstance(task, PermutedVocabulary)
        assert isinstance(task.gather_tensors, GatherTensors), (
            "plan.gather_task finds a tensor's files inside the task that aligns vocabularies"
        )
    assert planner._tokenizer_task is not None


def test_parameters_are_resolved_for_each_tensor(planned):
    values = {"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}
    planner, _ = planned(parameters={**values, "no_such_key": 3})
    for weight, task in planner._tensors:
        assert task.parameters["normalize"] is ("mlp" in weight.name), (
            "plan_check.py and learning read mergekit's own values for each tensor"
        )
        assert "no_such_key" not in task.parameters.keys(), (  # noqa: SIM118
            "recipe_check.py refuses unknown keys because mergekit drops them"
        )
        assert set(task.input_parameters.keys()) >= set(task.model_order[:2])


def test_a_task_is_made_anew_from_its_fields(planned):
    planner, _ = planned()
    _, task = planner._tensors[0]
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    fields["parameters"] = {**dict(task.parameters.items()), "int8_mask": True}
    again = type(task)(**fields)
    assert again.parameters["int8_mask"] is True
    assert again != task, "planner.with_mask makes mergekit's tasks anew, with their mask"
    assert hash(type(task)(**{**fields, "parameters": task.parameters})) == hash(task)


def test_the_executor_gives_each_target_with_its_value(planned):
    planner, _ = planned()
    by_task = {task.gather_tensors: weight for weight, task in planner._tensors}
    executor = Executor(targets=list(by_task), math_device="cpu", storage_device="cpu")
    seen = {}
    for task, tensors in executor.run(quiet=True, desc="reading"):
        seen[by_task[task].name] = tensors
        assert all(isinstance(model, ModelReference) for model in tensors)
    assert len(seen) == len(by_task), (
        "sources.py reads tensors through GatherTensors and finds them again by the task"
    )


def test_the_loaders_are_shared_and_tell_where_tensors_are(family):
    model = ModelReference.parse(str(family / "base"))
    loader = LoaderCache().get(model)
    assert LoaderCache().get(model) is loader, "checks and merge open a model once"
    assert loader.index.base_path == str(family / "base")
    assert set(loader.index.tensor_paths.values()) == {"model.safetensors"}, (
        "headers.py and sources.py take files and tensors from LazyTensorLoader.index"
    )


def test_an_adapter_is_kept_under_the_names_of_both(tmp_path):
    model = ModelReference.parse("org/base+org/adapter")
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    (tmp_path / name).mkdir()
    merged = model.merged(cache_dir=str(tmp_path))
    assert merged.model.path == str(tmp_path / name), (
        "model_check.py looks for a kept adapter where ModelReference.merged puts it"
    )


def test_recipes_are_written_and_filters_read():
    assert {"models", "base_model", "parameters", "tokenizer"} <= set(
        MergeConfiguration.model_fields
    ), "recipe_check.text_problems takes mergekit's fields for the keys that a recipe may have"
    parsed = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "models": [{"model": "a"}],
            "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 2}], "t": [0, 1]},
        }
    )
    first, _ = parsed.parameters["weight"]
    assert isinstance(first, ConditionalParameter)
    assert (first.filter, first.value) == ("mlp", 1)
    assert parsed.parameters["t"] == [0, 1], (
        "value_check.py tells filters, which have the attribute filter, from gradients"
    )
    assert yaml.dump({"a": [1, 2]}, Dumper=ConfigYamlDumper)


def test_the_stock_command_calls_run_merge_by_its_name():
    from mergekit.scripts import multimerge, run_yaml

    for script in (run_yaml, multimerge):
        assert hasattr(script, "run_merge"), (
            f"autoload.py gives {script.__name__} our run_merge, which checks and reports"
        )
    assert run_yaml.main.callback is not None, "cli.py calls mergekit-yaml's own function"
    assert {"config_file", "out_path"} <= {p.name for p in run_yaml.main.params}, (
        "cli.py hands on mergekit's own options"
    )
    run_merge = inspect.unwrap(sys.modules["mergekit.merge"].run_merge)
    assert list(inspect.signature(run_merge).parameters)[:4] == [
        "merge_config",
        "out_path",
        "options",
        "config_source",
    ], "planner.wrap_run_merge calls the original by place"


def test_a_merge_writes_its_recipe_and_its_card_together(family_recipe, tmp_path):
    recipe = family_recipe() | {"merge_method": "task_arithmetic", "parameters": {}}
    tiny.merged(recipe, tmp_path / "with")
    assert {"README.md", "mergekit_config.yml"} <= set(os.listdir(tmp_path / "with")), (
        "report/card.py writes into the card, verify.py reads the recipe beside a merge"
    )


def test_no_dtype_is_no_type():
    assert dtype_from_name(None) is None
    assert dtype_from_name("bfloat16") is torch.bfloat16, "verify.py casts as mergekit does"


# transformers.


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_llama(0, 64)


def test_a_models_parts_are_where_learning_looks(model):
    ids = torch.arange(4)[None]
    output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert output.last_hidden_state.shape == (1, 4, 32), (
        "logprobs.py takes hidden states from base_model, and logits from the output embeddings"
    )
    logits = model.get_output_embeddings()(output.last_hidden_state)
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
    assert model.config.get_text_config() is model.config, (
        "granularity.py and forecast.py read sizes from the text configuration"
    )
    assert model.config.get_text_config().num_hidden_layers == 2


def test_layers_are_one_list_whose_forward_can_be_replaced(model):
    from somf_mergekit.learner.layers import layers_of

    layers = layers_of(model)
    seen = []

    def forward(hidden_states, *arguments, **keywords):
        seen.append(sorted(keywords))
        return hidden_states

    for layer in layers:
        layer.forward = forward
    try:
        given = model.base_model(input_ids=torch.arange(4)[None], use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    assert len(seen) == 2, (
        "learner/streaming.py replaces a layer's forward: transformers must call layers as modules"
    )
    expected = model.base_model.norm(model.base_model.embed_tokens(torch.arange(4)[None]))
    assert torch.equal(given.last_hidden_state, expected)


def test_a_model_is_made_without_drawing_its_weights():
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    before = torch.random.get_rng_state()
    with no_init_weights():
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.tie_weights()
    assert torch.equal(before, torch.random.get_rng_state()), (
        "learner/model.py makes large models without drawing weights that are written over"
    )


def test_checkpoint_names_are_turned_into_the_models(model):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    for transform in get_model_conversion_mapping(model):
        if isinstance(transform, WeightRenaming):
            name, _ = transform.rename_source_key("model.norm.weight")
            assert name == "model.norm.weight"


def test_a_tokenizer_tells_all_that_decides_its_tokens():
    tokenizer = tiny.tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert {"model", "padding", "truncation"} <= set(content), (
        "provenance.py takes a tokenizer's fingerprint from what it would write"
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|assistant|> "), "dialogue.py opens the answer as the template does"
    assert tokenizer("how", add_special_tokens=False)["input_ids"]
    assert tokenizer.is_fast
    assert "eos_token" in tokenizer.special_tokens_map


def test_greedy_answers_are_those_of_single_prompts(model):
    def answer(ids, mask):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=2,
        )

    alone = answer(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.int64))
    padded = answer(torch.tensor([[2, 2, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    assert alone[0, 2:].tolist() == padded[0, 4:].tolist(), (
        "evaluate/generation.py pads prompts at the left, and takes what follows for the answer"
    )


def test_the_layers_of_gpt2_are_inputs_first():
    from transformers.pytorch_utils import Conv1D

    assert tuple(Conv1D(3, 5).weight.shape) == (5, 3), (
        "granularity.py takes GPT-2's layers for (inputs, outputs)"
    )


# datasets.


def test_local_files_are_read_as_rows_of_columns(tmp_path):
    file = tiny.write_jsonl(tmp_path / "a [1].jsonl", [{"a": "x", "b": [{"c": "y"}]}, {"a": "z"}])
    import glob

    rows = datasets.load_dataset("json", data_files=glob.escape(str(file)), split="train")
    assert rows.column_names == ["a", "b"]
    assert next(iter(rows)) == {"a": "x", "b": [{"c": "y"}]}, (
        "preferences.py and answers.py read rows as mappings, messages as lists of mappings"
    )


def test_a_saved_dataset_is_known_by_its_state(tmp_path):
    datasets.Dataset.from_list([{"a": "x"}]).save_to_disk(str(tmp_path / "saved"))
    assert (tmp_path / "saved/state.json").exists(), "rows.py knows a saved dataset by state.json"
    assert datasets.load_from_disk(str(tmp_path / "saved")).column_names == ["a"]


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"a": "x"}])
    with pytest.raises(ValueError, match="lost"):
        datasets.load_dataset(str(tmp_path), split="lost")


def test_a_builder_tells_the_files_that_it_will_read(tmp_path):
    file = tiny.write_jsonl(tmp_path / "train.jsonl", [{"a": "x"}])
    files = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    assert [str(name) for part in files.values() for name in part] == [str(file)], (
        "rows.py looks whether a dataset leads to files outside of it"
    )


def test_what_is_read_by_opening_files_is_known_by_its_kind():
    for kind in (datasets.Image(), datasets.Audio()):
        assert hasattr(kind, "decode_example"), "rows.py leaves out such columns"
    assert not hasattr(datasets.Value("string"), "decode_example")


# torch.


def test_torch_calls_what_other_packages_announce():
    assert hasattr(torch, "_import_device_backends"), (
        "The stock mergekit-yaml knows somf because torch calls the entry points of the group "
        "torch.backends when it is imported; without that, `mergekit-somf merge` alone knows it"
    )


def test_a_gradient_is_told_when_it_is_complete():
    weight = torch.ones(2, requires_grad=True)
    told = []

    def hook(tensor):
        told.append(tensor.grad.tolist())
        tensor.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    (weight * 2 + weight * 3).sum().backward()
    assert told == [[5.0, 5.0]], (
        "learner/engine.py moves logits in the hook, once all uses of a weight are added up"
    )
    assert weight.grad is None


def test_a_weights_memory_can_go_and_come_back():
    weight = torch.nn.Parameter(torch.ones(4))
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    with torch.no_grad():
        weight.fill_(2.0)
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [3.0] * 4, (
        "learner/streaming.py frees a layer's weights and brings them back under the same parameter"
    )


def test_random_numbers_are_put_back_as_they_were():
    before = torch.random.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(-5)
        first = torch.rand(3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(-5)
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before), (
        "fusions.py seeds each tensor's draws and leaves the process' own as they were"
    )


def test_a_mapped_file_outlives_its_name(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(b"\0" * 16)
    tensor = torch.from_file(str(path), shared=True, size=4, dtype=torch.float32)
    path.unlink()
    tensor.fill_(1.5)
    assert tensor.tolist() == [1.5] * 4, "learner/mapped.py keeps weights in files without a name"


def test_extremes_tell_nan_and_infinity():
    for broken_value in (float("nan"), float("inf")):
        low, high = torch.aminmax(torch.tensor([1.0, broken_value]))
        assert not (torch.isfinite(low) and torch.isfinite(high)), (
            "groups.is_finite looks at a tensor's extremes alone"
        )


def test_whole_numbers_wrap_around():
    words = torch.tensor([2**62], dtype=torch.int64).mul_(4)
    assert words.tolist() == [0]
    assert (torch.tensor([-8]) >> 1).tolist() == [-4]
    assert torch.tensor([1], dtype=torch.int64).view(torch.int16).tolist() == [1, 0, 0, 0], (
        "noise.py computes in int64 that wraps and shifts with its sign, little end first"
    )


def test_several_processes_have_the_names_of_gather_and_scatter():
    distributed = torch.distributed
    for names in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        assert any(hasattr(distributed, name) for name in names), f"shards.py needs one of {names}"


# safetensors, and what else is small.


def test_a_header_tells_shapes_types_and_what_we_wrote(tmp_path):
    content = {
        "codes": torch.zeros(2, 3, dtype=torch.uint8),
        "half": torch.zeros(1, dtype=torch.bfloat16),
        "small": torch.zeros(1).to(torch.float8_e4m3fn),
    }
    save_file(content, tmp_path / "a.safetensors", metadata={"somf": "told"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"somf": "told"}
        types = {name: file.get_slice(name).get_dtype() for name in content}
        assert list(file.get_slice("codes").get_shape()) == [2, 3]
    assert types == {"codes": "U8", "half": "BF16", "small": "F8_E4M3"}, (
        "masks.py and headers.py judge a file by its header, by these names of types"
    )
    (tmp_path / "b.safetensors").write_bytes(b"no such header")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "b.safetensors", framework="pt")


def test_a_lock_that_is_held_is_told_at_once(tmp_path):
    from filelock import FileLock, Timeout

    with FileLock(tmp_path / "lock").acquire(timeout=0), pytest.raises(Timeout):
        FileLock(tmp_path / "lock").acquire(timeout=0)
    FileLock(tmp_path / "lock").acquire(timeout=0).__exit__(None, None, None)


def test_a_hook_on_a_module_that_is_there_is_called_at_once():
    import wrapt

    called = []
    wrapt.register_post_import_hook(called.append, "json")
    assert called == [json], "autoload.py also registers where mergekit came before torch's call"


def test_checksums_are_what_they_were():
    import xxhash

    assert xxhash.xxh3_128(b"somf").hexdigest() == "27dcc75ac0b4911602809eb9d6494885", (
        "mask_header.py tells damage by XXH3: masks that are published keep their checksums"
    )


def test_a_recipes_error_ends_mergekits_command_in_one_line(broken):
    with pytest.raises(RecipeError, match="lost") as caught:
        check_contracts(MERGING)
    assert caught.value.exit_code == 1
