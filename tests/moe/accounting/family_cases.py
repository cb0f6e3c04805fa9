"""Models of every family: config changes that make them small, and published configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Small, and no two widths alike, so that a mixed-up axis changes a count.
SMALL = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 14, "num_experts": 6}
OLMOE_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
LATENT = {
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
}
JAMBA = {
    "num_hidden_layers": 6,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 3,
    "mamba_dt_rank": 5,
    "use_mamba_kernels": False,
}
ERNIE = {
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_intermediate_size": 14,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
}
DBRX_SMALL: dict[str, Any] = {
    "d_model": 24,
    "n_heads": 4,
    "n_layers": 3,
    "vocab_size": 101,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 24, "ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 3},
}
# transformers 5.23 reads rope_theta from the attention's config and fails without.
DBRX_DEFAULT: dict[str, Any] = {
    "attn_config": {"rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 2048},
}


@dataclass(frozen=True)
class Case:
    """A model that transformers builds from ``AutoConfig.for_model(family, **change)``."""

    family: str
    change: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return f"{self.family}-{self.label}" if self.label else self.family


def _small(family: str, label: str = "small", **change: Any) -> Case:
    return Case(family, {**SMALL, **change}, label)


SMALL_CASES = (
    _small("llama"),
    _small("llama", "biased", attention_bias=True, mlp_bias=True, head_dim=8),
    _small("llama", "tied", tie_word_embeddings=True),
    _small("mistral", head_dim=10, sliding_window=3),
    _small("mixtral", **MIXTRAL_EXPERTS),
    _small("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=2),
    _small("qwen2", "tied", tie_word_embeddings=True),
    _small("qwen3", attention_bias=True, head_dim=8),
    _small("qwen2_moe", **QWEN_EXPERTS, shared_expert_intermediate_size=22, mlp_only_layers=[1]),
    _small("qwen2_moe", "no_bias", **QWEN_EXPERTS, shared_expert_intermediate_size=22, qkv_bias=False),
    _small("qwen3_moe", **QWEN_EXPERTS, decoder_sparse_step=2, head_dim=8),
    _small("gemma", head_dim=8),
    _small("gemma2", head_dim=8),
    _small("gemma3_text", head_dim=8),
    _small("olmo"),
    _small("olmo2"),
    _small("olmo3", sliding_window=3),
    _small("olmoe", **OLMOE_EXPERTS),
    _small("flex_olmo", **OLMOE_EXPERTS),
    _small("phi"),
    _small("phi", "normed", qk_layernorm=True),
    _small("phi3", sliding_window=3),
    _small("phimoe", **MIXTRAL_EXPERTS),
    _small("phimoe", "biased", **MIXTRAL_EXPERTS, attention_bias=True, lm_head_bias=True),
    _small("deepseek_v2", **LATENT, n_shared_experts=2),
    _small("deepseek_v2", "no_latent_query", **{**LATENT, "q_lora_rank": None}, attention_bias=True),
    _small("deepseek_v3", **LATENT, n_shared_experts=1),
    _small("deepseek_v3", "biased", **LATENT, n_shared_experts=2, attention_bias=True),
    _small("glm4_moe", **GROUPED, n_shared_experts=2, head_dim=8),
    _small("glm4_moe", "normed", **GROUPED, n_shared_experts=1, attention_bias=True, use_qk_norm=True),
    _small("gpt_oss", **MIXTRAL_EXPERTS, head_dim=8, sliding_window=3),
    _small("gpt_oss", "tied", **MIXTRAL_EXPERTS, head_dim=8, tie_word_embeddings=True),
    _small(
        "llama4_text",
        **{**MIXTRAL_EXPERTS, "num_experts_per_tok": 1},
        head_dim=8,
        intermediate_size_mlp=52,
        interleave_moe_layer_step=2,
        attention_chunk_size=3,
    ),
    Case("dbrx", DBRX_SMALL, "small"),
    _small("dots1", **GROUPED, n_shared_experts=2, head_dim=8, attention_bias=True),
    _small("granitemoe", **MIXTRAL_EXPERTS, attention_bias=True),
    _small("granitemoeshared", **MIXTRAL_EXPERTS, shared_intermediate_size=22, tie_word_embeddings=True),
    _small("granitemoeshared", "unshared", **MIXTRAL_EXPERTS, shared_intermediate_size=0),
    _small("minimax_m2", **MIXTRAL_EXPERTS, head_dim=8),
    _small("hunyuan_v1_moe", num_experts=6, moe_topk=3, head_dim=8),
    _small("hunyuan_v1_moe", "biased", num_experts=6, moe_topk=3, attention_bias=True, head_dim=8),
    _small("ernie4_5_moe", **ERNIE),
    _small("ernie4_5_moe", "biased", **{**ERNIE, "moe_layer_interval": 2}, use_bias=True, head_dim=8),
    _small("ernie4_5_moe", "untied", **ERNIE, moe_layer_end_index=3, tie_word_embeddings=False),
    _small("jamba", **JAMBA),
    _small("jamba", "biased", **JAMBA, mamba_proj_bias=True, mamba_conv_bias=False),
)

# Published as the defaults of the config class; DeepSeek-V2's own lack the experts a token uses, dots.llm1's
# the experts, and Hunyuan's the width of a head.
DEFAULT_CASES = (
    *(
        Case(family, {}, "default")
        for family in (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "qwen2_moe",
            "qwen3_moe",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo",
            "olmo2",
            "olmo3",
            "olmoe",
            "flex_olmo",
            "phi",
            "phi3",
            "phimoe",
            "deepseek_v3",
            "ernie4_5_moe",
            "glm4_moe",
            "gpt_oss",
            "granitemoe",
            "granitemoeshared",
            "minimax_m2",
            "llama4_text",
            "jamba",
        )
    ),
    Case("deepseek_v2", {"num_experts_per_tok": 6}, "default"),
    Case("dots1", {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2}, "default"),
    Case("hunyuan_v1_moe", {"head_dim": 128}, "default"),
    Case("dbrx", DBRX_DEFAULT, "default"),
)
