"""Families of models, each as the configuration of a tiny one of two to four layers."""

from dataclasses import dataclass
from typing import Any

import transformers


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: the name of its configuration in transformers.
        own: what it is given.
        kind: what it is an example of.
    """

    config: str
    own: dict[str, Any]
    kind: str

    def made(self, tokens: int) -> Any:
        """Return its configuration for so many tokens."""
        config = getattr(transformers, self.config)(**self.own)
        config.get_text_config().vocab_size = tokens
        return config


_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 16}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {**_GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4}
_DEEPSEEK = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    **_WIDE,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
# No token of a text.
_TOKENS = {"image_token_id": 905, "video_token_id": 906}
_VISION = {**_TOKENS, "vision_start_token_id": 907, "vision_end_token_id": 908}


def _text(config: str, kind: str = "dense", **own: Any) -> Family:
    return Family(config, {**_SIZE, **own}, kind)


def _wrapper(
    config: str, text: dict[str, Any], vision: dict[str, Any], kind: str = "wrapper", **own: Any
) -> Family:
    eye = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    inner = {"text_config": {**_SIZE, **_WIDE, **text}, "vision_config": {**eye, **vision}}
    return Family(config, {**inner, **own}, kind)


def _rope(*sections: int) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": parameters}


def _depth(model_type: str, **own: Any) -> dict[str, Any]:
    return {"model_type": model_type, "depth": 1, "num_heads": 4, **own}


_GEMMA_4 = {"global_head_dim": 16, "hidden_size_per_layer_input": 0}
# Those with embeddings for each layer.
_GEMMA_4_E = {**_GEMMA_4, "hidden_size_per_layer_input": 8}
FAMILIES = {
    "Llama": _text("LlamaConfig", **_GROUPED),
    "Mistral": _text("MistralConfig", **_GROUPED),
    "Ministral 3 (text)": _text("Ministral3Config", **_WIDE),
    "Qwen2": _text("Qwen2Config", "tied", **_GROUPED, tie_word_embeddings=True),
    "Qwen3": _text("Qwen3Config", **_WIDE),
    "Gemma": _text("GemmaConfig", "tied", **_WIDE),
    "Gemma 2": _text("Gemma2Config", "tied", **_WIDE, query_pre_attn_scalar=16),
    "Gemma 3 (text)": _text("Gemma3TextConfig", "tied", **_WIDE, query_pre_attn_scalar=16),
    "Gemma 4 (text)": _text("Gemma4TextConfig", "tied", **_WIDE, **_GEMMA_4),
    "Gemma 4 E (text)": _text("Gemma4TextConfig", "tied", **_WIDE, **_GEMMA_4_E),
    "Phi": _text("PhiConfig"),
    "Phi 3": _text("Phi3Config", **_GROUPED),
    "GPT-NeoX": _text("GPTNeoXConfig"),
    "GPT-2": _text("GPT2Config", "tied"),
    "OLMo": _text("OlmoConfig", **_GROUPED),
    "OLMo 2": _text("Olmo2Config", **_GROUPED),
    "OLMo 3": _text("Olmo3Config", **_GROUPED),
    "Granite": _text(
        "GraniteConfig",
        **_GROUPED,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.25,
    ),
    "StableLM": _text("StableLmConfig", **_GROUPED, use_qkv_bias=True),
    "StarCoder 2": _text("Starcoder2Config", "tied", **_GROUPED),
    "Cohere": _text("CohereConfig", "tied", **_GROUPED),
    "Cohere 2": _text("Cohere2Config", "tied", **_GROUPED),
    "SmolLM 3": _text("SmolLM3Config", "tied", **_GROUPED),
    "GLM": _text("GlmConfig", **_WIDE),
    "GLM 4": _text("Glm4Config", **_WIDE),
    "EXAONE 4": _text("Exaone4Config", **_GROUPED),
    "Nemotron": _text("NemotronConfig", **_GROUPED),
    "Arcee": _text("ArceeConfig", **_GROUPED),
    "Apertus": _text("ApertusConfig", **_GROUPED),
    "Seed-OSS": _text("SeedOssConfig", **_WIDE),
    "Hunyuan": _text("HunYuanDenseV1Config", **_WIDE),
    "Falcon": _text(
        "FalconConfig",
        "tied",
        ffn_hidden_size=64,
        new_decoder_architecture=True,
        num_kv_heads=2,
        alibi=False,
    ),
    "Mixtral": _text("MixtralConfig", "mixture", **_LOCAL),
    "Qwen2-MoE": _text(
        "Qwen2MoeConfig",
        "mixture",
        **_GROUPED,
        **_ROUTED,
        num_experts=4,
        shared_expert_intermediate_size=32,
    ),
    "Qwen3-MoE": _text("Qwen3MoeConfig", "mixture", **_GROUPED, **_ROUTED, num_experts=4),
    "OLMoE": _text("OlmoeConfig", "mixture", **_GROUPED, num_experts_per_tok=2, num_experts=4),
    "Phi 3.5-MoE": _text("PhimoeConfig", "mixture", **_LOCAL),
    "MiniMax": _text("MiniMaxConfig", "mixture", **_LOCAL, head_dim=16),
    "Granite-MoE": _text("GraniteMoeConfig", "packed", **_LOCAL),
    "GPT-OSS": _text("GptOssConfig", "packed", **_LOCAL, head_dim=16),
    "DeepSeek V2": _text("DeepseekV2Config", "mixture", **_DEEPSEEK),
    "DeepSeek V3": _text("DeepseekV3Config", "mixture", **_DEEPSEEK),
    "dots.1": _text(
        "Dots1Config",
        "mixture",
        **_GROUPED,
        **_ROUTED,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "GLM 4-MoE": _text(
        "Glm4MoeConfig",
        "mixture",
        **_WIDE,
        **_ROUTED,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "ERNIE 4.5-MoE": _text(
        "Ernie4_5_MoeConfig",
        "mixture",
        **_GROUPED,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_layer_start_index=1,
    ),
    "Qwen3-Next": _text(
        "Qwen3NextConfig",
        "hybrid",
        **_LINEAR,
        **_ROUTED,
        num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "Qwen3.5 (text)": _text("Qwen3_5TextConfig", "hybrid", **_LINEAR),
    "LFM 2": _text(
        "Lfm2Config",
        "hybrid",
        **_GROUPED,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "Falcon-H1": _text(
        "FalconH1Config",
        "hybrid",
        **_GROUPED,
        **{**_MAMBA, "mamba_n_heads": 4},
        mamba_d_ssm=32,
    ),
    "Granite 4 (hybrid)": _text(
        "GraniteMoeHybridConfig",
        "hybrid",
        **_LOCAL,
        **_MAMBA,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
    ),
    "Nemotron-H": _text(
        "NemotronHConfig",
        "hybrid",
        **_WIDE,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
    ),
    "Jamba": _text(
        "JambaConfig",
        "hybrid",
        **_GROUPED,
        num_experts_per_tok=2,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "Bamba": _text("BambaConfig", "hybrid", **_GROUPED, **_MAMBA, attn_layer_indices=[1]),
    "Qwen3.5": _wrapper(
        "Qwen3_5Config",
        {"model_type": "qwen3_5_text", **_LINEAR},
        _depth("qwen3_5", out_hidden_size=32, deepstack_visual_indexes=[0]),
        **_VISION,
    ),
    "Gemma 3": _wrapper(
        "Gemma3Config",
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=905,
        boi_token_index=906,
        eoi_token_index=907,
    ),
    "Gemma 4": _wrapper(
        "Gemma4Config",
        {"model_type": "gemma4_text", **_GEMMA_4},
        {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 4},
        audio_config=None,
    ),
    "Gemma 4 E": _wrapper(
        "Gemma4Config",
        {"model_type": "gemma4_text", **_GEMMA_4_E},
        {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 4},
        audio_config=None,
    ),
    "Mistral 3": _wrapper(
        "Mistral3Config",
        {"model_type": "mistral"},
        {"model_type": "pixtral", "head_dim": 8},
        image_token_index=905,
        spatial_merge_size=2,
    ),
    "Ministral 3": _wrapper(
        "Mistral3Config",
        {"model_type": "ministral3"},
        {"model_type": "pixtral", "head_dim": 8},
        image_token_index=905,
        spatial_merge_size=2,
    ),
    "Llama 4": _wrapper(
        "Llama4Config",
        {
            "model_type": "llama4_text",
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
        },
        {
            "model_type": "llama4_vision_model",
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        image_token_index=905,
        boi_token_index=906,
        eoi_token_index=907,
    ),
    "Qwen2-VL": _wrapper(
        "Qwen2VLConfig",
        {"model_type": "qwen2_vl_text", "head_dim": 8, **_rope(2, 1, 1)},
        _depth("qwen2_vl", embed_dim=32),
        **_VISION,
    ),
    "Qwen2.5-VL": _wrapper(
        "Qwen2_5_VLConfig",
        {"model_type": "qwen2_5_vl_text", "head_dim": 8, **_rope(2, 1, 1)},
        _depth("qwen2_5_vl", out_hidden_size=32, fullatt_block_indexes=[0]),
        **_VISION,
    ),
    "Qwen3-VL": _wrapper(
        "Qwen3VLConfig",
        {"model_type": "qwen3_vl_text", **_rope(4, 2, 2)},
        _depth(
            "qwen3_vl", out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16
        ),
        **_VISION,
    ),
    "LLaVA": _wrapper(
        "LlavaConfig",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=905,
        vision_feature_layer=-1,
    ),
    "SmolVLM": _wrapper(
        "SmolVLMConfig",
        {"model_type": "llama"},
        {"model_type": "smolvlm_vision"},
        image_token_id=905,
        scale_factor=2,
    ),
    "Idefics 3": _wrapper(
        "Idefics3Config",
        {"model_type": "llama"},
        {"model_type": "idefics3_vision"},
        image_token_id=905,
        scale_factor=2,
    ),
    "InternVL": _wrapper(
        "InternVLConfig",
        {"model_type": "qwen2"},
        {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=905,
    ),
}
