"""Tiny configs of transformers' own mixtures: layers of several kinds where a family has them."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_V3 = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "head_dim": 8,
}

#: Family -> what its config has beyond the common values.
CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "route_scale": 1.5,
        "head_dim": 8,
    },
    "deepseek_v2": _LATENT
    | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _LATENT | {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    "dots1": _V3 | {"norm_topk_prob": True},
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "tie_word_embeddings": True,
    },
    "flex_olmo": {"num_experts": 8, "norm_topk_prob": False},
    "glm4_moe": _V3 | {"norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "granitemoe": {"num_local_experts": 8, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_experts": 8,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "minimax": {
        "num_local_experts": 8,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {"num_local_experts": 8, "head_dim": 8},
    "mixtral": {"num_local_experts": 8, "sliding_window": 8},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False, "tie_word_embeddings": True},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "phimoe": {"num_local_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen3_next": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "head_dim": 8,
    },
}


def family_config(family: str) -> dict[str, Any]:
    """All values of a family's tiny config."""
    return _COMMON | CONFIGS[family]
