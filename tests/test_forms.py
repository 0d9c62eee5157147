"""Whatever form checkpoints have, no tensor of theirs is lost: it is merged, or refused early."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DEEPSEEK = {
    **SIZE,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERT = "model.layers.1.mlp.experts.0.down_proj.weight"
PACKED = "model.layers.1.mlp.experts.down_proj"


def saved(folder, config, **options):
    """Save a base and two fine-tuned models of a configuration's class."""
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    base = transformers.AutoModelForCausalLM.from_config(config)
    for seed, name in enumerate(("base", "math", "code")):
        model = tiny.perturbed(base, seed) if seed else base
        tiny.save_model(model, tokenizer, folder / name, **options)
    return folder


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory):
    """Of a class that mergekit infers, with a name an expert, as transformers saves it."""
    return saved(tmp_path_factory.mktemp("deepseek"), transformers.DeepseekV3Config(**DEEPSEEK))


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The same, saved as transformers has it in memory."""
    config = transformers.DeepseekV3Config(**DEEPSEEK)
    return saved(tmp_path_factory.mktemp("packed"), config, save_original_format=False)


def resta(folder):
    """A repair: the fine-tuned model less gamma times what the unaligned one changed."""
    return {
        "merge_method": "resta",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "math")},
            {"model": str(folder / "code"), "parameters": {"role": "unaligned"}},
        ],
        "parameters": {"gamma": 0.5},
        "dtype": "float32",
    }


def somf(folder, family, base="base", math="math"):
    return tiny.recipe(
        folder / base,
        [folder / math],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=1,
        batch_size=4,
        max_length=48,
    )


def changed(folder, name, change):
    """Change the tensors of one of a folder's models."""
    tensors = tiny.tensors_of(folder / name)
    change(tensors)
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copied(tmp_path):
    def copy(family, *names):
        for name in names or ("base", "math", "code"):
            shutil.copytree(family / name, tmp_path / name)
        return tmp_path

    return copy


def checked(content, folder, code=1):
    """What `check` says of a recipe, in one line."""
    file = tiny.write_recipe(folder / "recipe.yml", content)
    result = tiny.invoke("mergekit-somf", "check", file)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize("form", ["deepseek", "packed"])
def test_no_method_loses_experts_that_mergekit_can_not_join(form, tmp_path, request):
    folder = request.getfixturevalue(form)
    written = tiny.merged(resta(folder), tmp_path / "out")
    models = {name: tiny.tensors_of(folder / name) for name in ("base", "math", "code")}
    assert written.keys() == models["base"].keys()
    name = EXPERT if form == "deepseek" else PACKED
    expected = models["math"][name] - 0.5 * (models["code"][name] - models["base"][name])
    torch.testing.assert_close(written[name], expected)


def test_experts_that_models_store_in_two_ways_are_joined(deepseek, packed, tmp_path):
    content = resta(deepseek)
    content["models"][0]["model"] = str(packed / "math")
    written = tiny.merged(content, tmp_path / "out")
    assert written.keys() == tiny.tensors_of(packed / "base").keys()
    models = {name: tiny.tensors_of(packed / name) for name in ("base", "math", "code")}
    expected = models["math"][PACKED] - 0.5 * (models["code"][PACKED] - models["base"][PACKED])
    torch.testing.assert_close(written[PACKED], expected)


def test_verify_finds_what_mergekit_has_lost(deepseek, tmp_path):
    content = {
        "merge_method": "linear",
        "models": [
            {"model": str(deepseek / name), "parameters": {"weight": 0.5}}
            for name in ("math", "code")
        ],
        "dtype": "float32",
    }
    tiny.merged(content, tmp_path / "out")
    result = tiny.invoke("mergekit-somf", "verify", tmp_path / "out")
    assert result.exit_code == 1
    assert f"inputs: WRONG: {deepseek / 'code'}, {deepseek / 'math'}: " in result.output
    assert "would lose 24 tensors" in result.output


@pytest.mark.parametrize("name", [PACKED, "model.layers.2.input_layernorm.weight"])
def test_a_tensor_that_one_model_lacks(packed, copied, tmp_path, name):
    folder = copied(packed)
    changed(folder, "math", lambda tensors: tensors.pop(name))
    said = tiny.refused(resta(folder), tmp_path)
    assert f"{folder / 'math'}: its checkpoint has no {name}" in said


def test_an_expert_that_one_model_lacks(tmp_path):
    """Those that are left would be joined to a smaller tensor."""
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    saved(tmp_path, transformers.Qwen3MoeConfig(**SIZE, **own))
    parts = [f"model.layers.0.mlp.experts.3.{part}_proj.weight" for part in ("down", "gate", "up")]

    def change(tensors):
        for part in parts:
            del tensors[part]

    changed(tmp_path, "code", change)
    said = tiny.refused(resta(tmp_path), tmp_path)
    assert f"its checkpoint lacks {parts[0]}" in said
    assert f"its checkpoint lacks {parts[1]}, {parts[2]}" in said


def test_tensors_that_a_definition_does_not_have(tmp_path):
    """Of Llama, mergekit has no biases of attention."""
    saved(tmp_path / "all", transformers.LlamaConfig(**SIZE, attention_bias=True))
    written = tiny.merged(resta(tmp_path / "all"), tmp_path / "out")
    assert written.keys() == tiny.tensors_of(tmp_path / "all/base").keys()
    saved(tmp_path, transformers.LlamaConfig(**SIZE, attention_bias=True))
    for name in ("base", "code"):
        biases = [n for n in tiny.tensors_of(tmp_path / name) if n.endswith("bias")]
        changed(tmp_path, name, lambda tensors, gone=biases: [tensors.pop(n) for n in gone])
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text()) | {"attention_bias": False}
        file.write_text(json.dumps(config))
    said = tiny.refused(resta(tmp_path), tmp_path)
    assert (
        f"{tmp_path / 'math'}: the merge would lose 12 tensors (model.layers.0.self_attn.k_proj"
        ".bias," in said
    )
    assert "mergekit's definition of LlamaForCausalLM doesn't have them" in said


def test_what_transformers_does_not_load_may_be_left_out(packed, copied, tmp_path, caplog):
    """Layers that predict further tokens, and buffers of older releases."""
    folder = copied(packed)
    extra = ["model.layers.3.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    changed(folder, "base", lambda tensors: tensors.update({n: torch.ones(4) for n in extra}))
    written = tiny.merged(resta(folder), tmp_path / "out")
    assert written.keys() == tiny.tensors_of(folder / "math").keys()
    assert (
        f"{folder / 'base'}: left out of the merge, since transformers doesn't load it either: "
        f"{extra[1]}, {extra[0]}" in caplog.text
    )


def test_layers_that_a_recipe_leaves_out(family, tmp_path):
    sources = [
        {"model": str(family / name), "layer_range": [1, 2]} for name in ("base", "math", "code")
    ]
    sources[2]["parameters"] = {"role": "unaligned"}
    content = resta(family) | {"slices": [{"sources": sources}]}
    del content["models"]
    written = tiny.merged(content, tmp_path / "out")
    assert {name.split(".")[2] for name in written if ".layers." in name} == {"0"}


def configured(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def of_class(name, config, folder):
    """Save a random model of a class of transformers, of the family's tokenizer."""
    tokenizer = tiny.tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    tiny.save_model(getattr(transformers, name)(config), tokenizer, folder)


def mixed(folder):
    of_class("MistralForCausalLM", transformers.MistralConfig(**SIZE), folder)


def reward_model(folder):
    config = transformers.LlamaConfig(**SIZE, num_labels=1)
    of_class("LlamaForSequenceClassification", config, folder)


def embedding_model(folder):
    of_class("LlamaModel", transformers.LlamaConfig(**SIZE), folder)


def of_no_class(folder):
    configured(folder, architectures=None)


def of_two_classes(folder):
    configured(folder, architectures=["LlamaForCausalLM", "LlamaModel"])


def adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def adapter_of_a_quantized_copy(folder):
    adapter(folder)
    name = "unsloth/base-unsloth-bnb-4bit"
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))


def gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def two_checkpoints(folder):
    index = {"weight_map": dict.fromkeys(tiny.tensors_of(folder), "one.safetensors")}
    shutil.copy(folder / "model.safetensors", folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def compressed(folder):
    configured(folder, compression_config={"format": "int-quantized"})


def with_tensor(ending):
    def change(folder):
        extra = {f"model.layers.0.mlp.up_proj{ending}": torch.ones(4)}
        changed(folder.parent, folder.name, lambda tensors: tensors.update(extra))

    return change


def of_integers(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    changed(
        folder.parent, folder.name, lambda tensors: tensors.update({name: tensors[name].char()})
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (mixed, "it is a MistralForCausalLM, {base} a LlamaForCausalLM"),
        (reward_model, "it is a LlamaForSequenceClassification, {base} a LlamaForCausalLM"),
        (embedding_model, "it is a LlamaModel, {base} a LlamaForCausalLM"),
        (
            of_no_class,
            "names no class as `architectures`, where mergekit needs one; of a causal "
            'language model, `"architectures": ["LlamaForCausalLM"]`',
        ),
        (of_two_classes, "names LlamaForCausalLM and LlamaModel as `architectures`"),
        (adapter, "it is an adapter; write `some/base+{model}`"),
        (adapter_of_a_quantized_copy, "it is an adapter; write `BASE+{model}`"),
        (gguf, "its weights are GGUF files"),
        (two_checkpoints, "it has both model.safetensors, which transformers loads, and"),
        (compressed, "it is quantized"),
        (
            with_tensor(".qweight"),
            "it is quantized, since it has model.layers.0.mlp.up_proj.qweight",
        ),
        (with_tensor(".SCB"), "it is quantized, since it has model.layers.0.mlp.up_proj.SCB"),
        (with_tensor(".weight_scale"), "it is quantized, since it has"),
        (with_tensor(".weight.absmax"), "it is quantized, since it has"),
        (of_integers, "it is quantized, since model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_forms_that_are_refused(family, tmp_path, change, said):
    shutil.copytree(family / "math", tmp_path / "math")
    change(tmp_path / "math")
    content = somf(family, family, math=tmp_path / "math")
    message = checked(content, tmp_path)
    assert f"{tmp_path / 'math'}: " in message
    assert said.format(base=family / "base", model=tmp_path / "math") in message
    assert message.count("Error:") == 1


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.gguf", "it is a GGUF file, which mergekit doesn't read"),
        ("model.safetensors", "it is a file; give the folder that it is in"),
    ],
)
def test_files_in_place_of_a_folder(family, tmp_path, file, said):
    shutil.copy(family / "math/model.safetensors", tmp_path / file)
    assert said in checked(somf(family, family, math=tmp_path / file), tmp_path)


def test_a_pickle_beside_safetensors_is_not_read(family, copied, tmp_path, caplog):
    folder = copied(family, "math")
    (folder / "math/pytorch_model.bin").write_bytes(b"none")
    checked(somf(family, family, math=folder / "math"), tmp_path, code=0)
    assert f"{folder / 'math'}: its safetensors are read, and not the pytorch_model" in caplog.text


def test_an_attention_that_is_not_installed(family, copied, tmp_path):
    folder = copied(family, "base")
    configured(folder / "base", attn_implementation="flash_attention_2")
    said = checked(somf(family, family, base=folder / "base"), tmp_path)
    assert "its configuration asks for what is not installed: FlashAttention2" in said
    assert "take it (attn_implementation) out of the base's config.json" in said


def vision_language(folder, seed):
    tokenizer = tiny.tiny_tokenizer()
    text = {**SIZE, "model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 8}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(seed)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=5, spatial_merge_size=2
    )
    made = transformers.Mistral3ForConditionalGeneration(config)
    tiny.save_model(made, tokenizer, folder)


def test_a_text_model_does_not_go_with_a_wrapper(family, tmp_path):
    for seed, name in enumerate(("base", "math")):
        vision_language(tmp_path / name, seed)
    for base, math, names in (
        (tmp_path / "base", family / "math", ("LlamaForCausalLM", "Mistral3ForCond")),
        (family / "base", tmp_path / "math", ("Mistral3ForConditionalGeneration", "LlamaForC")),
    ):
        said = checked(somf(tmp_path, family, base=base, math=math), tmp_path)
        assert f"model {math}: it is a {names[0]}, {base} a {names[1]}" in said


def test_what_writes_no_text_is_not_learned_on(tmp_path, family):
    for name in ("base", "math"):
        reward_model(tmp_path / name)
    said = checked(somf(tmp_path, family), tmp_path)
    assert "is a LlamaForSequenceClassification, and it has no output head to write text" in said


def lora(base, folder, **options):
    """Save an adapter of a base; return its name in a recipe."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(folder)
    return folder


def adapter_config(**values):
    def change(folder, _):
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text()) | values
        stored = {key: value for key, value in content.items() if value is not None}
        file.write_text(json.dumps(stored))

    return change


def of_a_wider_base(folder, tokenizer):
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer), hidden=64), tokenizer, folder / "wide")
    lora(folder / "wide", folder)
    adapter_config(base_model_name_or_path=None)(folder, None)


def adapter_tensors(change):
    def changed(folder, _):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


def under_other_names(tensors):
    for name in list(tensors):
        tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)


def without_a_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def prompt_tuning(folder, tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    model = tiny.tiny_llama(0, len(tokenizer))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(folder)


@pytest.fixture(scope="session")
def q_adapter(family, tmp_path_factory):
    return lora(family / "base", tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapter_config(peft_type=None), "is missing required keys: {'peft_type'}"),
        (adapter_config(peft_type="NOVEL"), "PEFT knows no adapter of the type 'NOVEL'"),
        (adapter_config(target_modules=["qkv"]), "Target modules"),
        (of_a_wider_base, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj"),
        (
            adapter_tensors(under_other_names),
            "the base has no place for its base_model.model.trans",
        ),
        (adapter_tensors(without_a_layer), "it has no base_model.model.model.layers.1.self_attn"),
        (prompt_tuning, "PROMPT_TUNING adds to the prompt and can't be merged into weights"),
    ],
)
def test_adapters_that_do_not_fit(family, q_adapter, tmp_path, change, said):
    place = tmp_path / "adapter"
    shutil.copytree(q_adapter, place)
    change(place, tiny.tiny_tokenizer())
    cache = tmp_path / "cache"
    content = somf(family, family, math=f"base+{place}")
    message = tiny.refused(content, tmp_path, "--lora-merge-cache", cache)
    assert f"the adapter {place} can't be put on its base: " in message
    assert said in message
    assert not cache.exists()


def test_an_adapter_is_merged_where_an_attempt_had_failed(
    family, q_adapter, tmp_path, caplog, monkeypatch
):
    """And it may be of a base of another name."""
    place = tmp_path / "adapter"
    shutil.copytree(q_adapter, place)
    adapter_config(base_model_name_or_path="someone/other")(place, None)
    cache = tmp_path / "cache"
    options = ("--lora-merge-cache", cache)
    content = resta(family)
    content["models"][0]["model"] = f"{family / 'base'}+{place}"

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
        said = tiny.refused(content, tmp_path, *options)
    assert "mergekit can't put the adapter on its base: No space left on device" in said
    assert list(cache.iterdir()) == []
    reference = ModelReference.parse(content["models"][0]["model"])
    (cache / f"{reference.model._unique_id()}_{reference.lora._unique_id()}").mkdir()
    written = tiny.merged(content, tmp_path / "out", *options)
    assert "was trained on someone/other, and is put on" in caplog.text
    base, code = (tiny.tensors_of(family / name) for name in ("base", "code"))
    parts = load_file(place / "adapter_model.safetensors")
    name = "layers.0.self_attn.q_proj"
    one, two = (parts[f"base_model.model.model.{name}.lora_{part}.weight"] for part in "AB")
    name = f"model.{name}.weight"
    # lora_alpha / r
    expected = base[name] + 4 * two @ one - 0.5 * (code[name] - base[name])
    torch.testing.assert_close(written[name], expected)


def test_adapters_of_what_mergekit_does_not_define(packed, tmp_path):
    place = lora(packed / "base", tmp_path / "adapter", target_modules=["o_proj"])
    content = resta(packed)
    content["models"][0]["model"] = f"{packed / 'base'}+{place}"
    said = tiny.refused(content, tmp_path, "--lora-merge-cache", tmp_path / "cache")
    assert "mergekit has no definition of DeepseekV3ForCausalLM, and infers none from" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_outside_of_what_is_masked(family, copied, tmp_path, value):
    """Only the merge itself can find it, in one line, and with a mask given or none at all."""
    name = "model.layers.1.input_layernorm.weight"
    content = somf(family, family)
    content["parameters"] |= {"include": "q_proj", "max_steps": 0}
    file = tiny.write_recipe(tmp_path / "learned.yml", content)
    assert tiny.invoke("mergekit-somf", "learn", file, tmp_path / "mask").exit_code == 0
    folder = copied(family)
    changed(folder, "math", lambda tensors: tensors[name].fill_(value))
    given = somf(folder, family)
    # Going by its files, it isn't the model any more that the mask was learned for.
    mask = {"mask": str(tmp_path / "mask"), "mask_transfer": True}
    given["parameters"] = {**mask, "include": "q_proj"}
    for recipe in (given, resta(folder)):
        file = tiny.write_recipe(tmp_path / "recipe.yml", recipe)
        result = tiny.invoke("mergekit-yaml", file, tmp_path / "out")
        assert isinstance(result.exception, SystemExit)
        assert f"{name} of {folder / 'math'} has NaN or infinite entries" in result.output
        assert not list(tmp_path.glob("out/*.safetensors"))
