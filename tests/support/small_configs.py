"""The smallest valid config of any model type: whatever sizes it has are shrunk."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 163
"""Odd, so that nothing works by alignment."""


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, Any] = {
    **_each(VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    **_each(VOCAB_SIZE, "entity_vocab_size"),
    # widths
    **_each(64, "hidden_size d_model n_embd emb_dim embed_dim embedding_size input_embedding_size"),
    **_each(64, "output_embedding_size word_embed_proj_dim embedding_dim lru_width hidden_dim"),
    **_each(64, "out_hidden_size vision_output_dim attention_hidden_size hidden_size_global"),
    **_each(128, "intermediate_size ffn_dim d_ff d_inner dim_ff dff ffn_hidden_size n_inner"),
    **_each(128, "encoder_ffn_dim decoder_ffn_dim feed_forward_size intermediate_size_mlp mlp_dim"),
    **_each(128, "dense_intermediate_size"),
    # attention
    **_each(4, "num_attention_heads n_head n_heads num_heads attention_heads index_n_heads"),
    **_each(4, "encoder_attention_heads decoder_attention_heads swa_num_attention_heads"),
    **_each(4, "num_encoder_attention_heads num_decoder_attention_heads"),
    **_each(2, "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads"),
    **_each(16, "head_dim d_kv dim_head d_head attention_head_size kv_channels swa_head_dim"),
    **_each(16, "qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank index_head_dim"),
    **_each(16, "linear_key_head_dim linear_value_head_dim linear_head_dim rotary_dim"),
    **_each(32, "q_lora_rank qk_head_dim o_lora_rank"),
    **_each(2, "linear_num_key_heads o_groups"),
    **_each(4, "linear_num_value_heads linear_num_heads"),
    **_each(8, "sliding_window sliding_window_size attention_window_size local_attention"),
    **_each(8, "attention_chunk_size index_topk window_size"),
    **_each(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    # depth
    **_each(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth"),
    **_each(2, "num_encoder_layers num_decoder_layers num_layers_per_stack num_blocks"),
    **_each(1, "first_k_dense_replace num_dense_layers"),
    **_each(0, "num_kv_shared_layers num_nextn_predict_layers"),
    # experts
    **_each(4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    **_each(1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts"),
    **_each(32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_each(32, "moe_shared_expert_intermediate_size router_hidden_size"),
    # state-space and recurrent layers
    **_each(16, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim"),
    **_each(16, "time_step_rank"),
    **_each(8, "mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size"),
    **_each(128, "mamba_d_ssm"),
    **_each(1, "mamba_n_groups n_groups mamba_ngroups"),
}
"""Field name: its small value. Fields that a config does not have are left out."""

_NEEDED = {"head_dim", "num_key_value_heads"}
"""Fields that are given also where the default is None."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64}},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "git": {"vision_config": {"image_size": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    **_each({"decoder_start_token_id": 0}, "t5 longt5 switch_transformers"),
    **_each(
        {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}},
        "glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_vl qwen2_vl",
    ),
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_SPECIAL["qwen4_exp_text"] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SPECIAL["qwen4_exp"] = {"text_config": _SPECIAL["qwen4_exp_text"]}
"""What a type needs besides; nested dicts go into its parts."""


def small_config(model_type: str) -> PretrainedConfig:
    """A config of this type with two or a few layers of width 64 and no dropout."""
    return _shrink(CONFIG_MAPPING[model_type], _SPECIAL.get(model_type, {}))


def _shrink(config_class: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    default = vars(_default(config_class, special))
    fields = {n: default[n] for n in inspect.signature(config_class).parameters if n in default}
    changes: dict[str, Any] = _fewer_layers(fields)
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            changes[name] = _shrink(type(value), special.get(name, {})).to_dict()
        elif isinstance(value, bool) or name in changes:
            continue
        elif name in _SIZES and (value or (value is None and name in _NEEDED)):
            changes[name] = _SIZES[name]
        elif isinstance(value, float) and "drop" in name:
            changes[name] = 0.0
        elif name.endswith("soft_cap") or name.endswith("softcapping"):
            changes[name] = 2.0  # where it bends
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            changes[name] = value % 10
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        changes["num_key_value_heads"] = changes.get("num_attention_heads")
    for name, value in special.items():
        if not isinstance(default.get(name), PretrainedConfig):
            changes[name] = value
    return config_class(**changes)


def _default(config_class: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    """The class's own defaults; a few of them are not valid by themselves."""
    try:
        return config_class()
    except ValueError:
        return config_class(**special)


def _fewer_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, at least two: lists with an entry a layer keep the same layers."""
    depth = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in fields), None)
    if depth is None or not fields[depth] or fields[depth] < 2:
        return {}
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == fields[depth]
    }
    kinds = [tuple(str(values[i]) for values in lists.values()) for i in range(fields[depth])]
    kept = sorted({kinds.index(kind) for kind in kinds} if lists else ())
    kept = kept if len(kept) > 1 else [0, 1]
    return {depth: len(kept), **{n: [values[i] for i in kept] for n, values in lists.items()}}
