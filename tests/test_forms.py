"""Whatever form checkpoints have, no tensor of theirs is lost: it is merged, or refused early."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

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


def somf(folder, family):
    models = [folder / "math", folder / "code"]
    return tiny.recipe(folder / "base", models, safety_dataset=str(family / "pairs.jsonl"))


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


def test_no_method_loses_experts_that_mergekit_can_not_join(deepseek, packed, family, tmp_path):
    said = tiny.refused(resta(deepseek), tmp_path)
    assert f"would lose 24 tensors ({EXPERT}, " in said
    assert "save_pretrained(FOLDER, save_original_format=False)" in said
    assert "would lose 24 tensors" in checked(somf(deepseek, family), tmp_path)
    # What is advised loses nothing.
    written = tiny.merged(resta(packed), tmp_path / "out")
    models = {name: tiny.tensors_of(packed / name) for name in ("base", "math", "code")}
    assert written.keys() == models["base"].keys()
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


@pytest.mark.parametrize("everywhere", [True, False])
def test_tensors_that_a_definition_does_not_have(tmp_path, everywhere):
    """Of Llama, mergekit has no biases of attention."""
    saved(tmp_path, transformers.LlamaConfig(**SIZE, attention_bias=True))
    if not everywhere:
        for name in ("base", "code"):
            biases = [n for n in tiny.tensors_of(tmp_path / name) if n.endswith("bias")]
            changed(tmp_path, name, lambda tensors, gone=biases: [tensors.pop(n) for n in gone])
            file = tmp_path / name / "config.json"
            config = json.loads(file.read_text()) | {"attention_bias": False}
            file.write_text(json.dumps(config))
    said = tiny.refused(resta(tmp_path), tmp_path)
    whose = ("base", "code", "math") if everywhere else ("math",)
    named = ", ".join(str(tmp_path / name) for name in whose)
    assert (
        f"{named}: the merge would lose 12 tensors (model.layers.0.self_attn.k_proj.bias," in said
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
