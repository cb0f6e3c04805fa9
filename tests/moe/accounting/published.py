"""Published models, as far as their cost depends on it, and what was counted of them apart from this code.

The figures were counted from transformers' models on the meta device; K/E of the routed experts are active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A config and its counts.

    Attributes:
        config: As in its ``config.json``.
        total: Parameters.
        active: With both embeddings.
        without_input: Without the input embedding.
        without_both: Without input embedding and head.
        expert: One routed expert.
        always: What every step reads besides routed experts; without the input embedding.
        kv: Bytes of cache a token at two bytes an element.
    """

    config: dict[str, Any]
    total: int
    active: int
    without_input: int
    without_both: int
    expert: int
    always: int
    kv: int


def _decoder(family: str, width: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


MIXTRAL_8X7B = {
    **_decoder("mixtral", 4096, 32, 32, 8, 32000),
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN15_MOE = {
    **_decoder("qwen2_moe", 2048, 24, 16, 16, 151936),
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
QWEN3_30B = {
    **_decoder("qwen3_moe", 2048, 48, 32, 4, 151936),
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
QWEN3_235B = {
    **_decoder("qwen3_moe", 4096, 94, 64, 4, 151936),
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
DEEPSEEK_V2_LITE = {
    **_decoder("deepseek_v2", 2048, 27, 16, 16, 102400),
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
DEEPSEEK_V3 = {
    **_decoder("deepseek_v3", 7168, 61, 128, 128, 129280),
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}
OLMOE = {
    **_decoder("olmoe", 2048, 16, 16, 16, 50304),
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
GPT_OSS_20B = {
    **_decoder("gpt_oss", 2880, 24, 64, 8, 201088),
    "head_dim": 64,
    "sliding_window": 128,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}
GPT_OSS_120B = {**GPT_OSS_20B, "num_hidden_layers": 36, "num_local_experts": 128}
LLAMA4_SCOUT = {
    **_decoder("llama4_text", 5120, 48, 40, 8, 202048),
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
}
LLAMA4_MAVERICK = {**LLAMA4_SCOUT, "num_local_experts": 128, "interleave_moe_layer_step": 2}
JAMBA = {
    **_decoder("jamba", 4096, 32, 32, 8, 65536),
    "intermediate_size": 14336,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 256,
}
DBRX = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "vocab_size": 100352,
    "attn_config": {"kv_n_heads": 8},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}

# fmt: off
MODELS: dict[str, Published] = {
    "Mixtral-8x7B": Published(
        MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248, 12_748_853_248, 12_617_781_248,
        176_160_768, 1_474_564_096, 131_072),
    "Qwen1.5-MoE-A2.7B": Published(
        QWEN15_MOE, 14_315_784_192, 2_689_173_504, 2_378_008_576, 2_066_843_648,
        8_650_752, 1_547_536_384, 196_608),
    "Qwen3-30B-A3B": Published(
        QWEN3_30B, 30_532_122_624, 3_353_032_704, 3_041_867_776, 2_730_702_848,
        4_718_592, 1_229_928_448, 98_304),
    "Qwen3-235B-A22B": Published(
        QWEN3_235B, 235_093_634_560, 22_190_763_520, 21_568_433_664, 20_946_103_808,
        18_874_368, 7_374_908_928, 192_512),
    "DeepSeek-V2-Lite": Published(
        DEEPSEEK_V2_LITE, 15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808,
        8_650_752, 1_101_917_696, 31_104),
    "DeepSeek-V3": Published(
        DEEPSEEK_V3, 671_026_404_352, 37_552_282_624, 36_625_603_584, 35_698_924_544,
        44_040_192, 16_190_954_496, 70_272),
    "OLMoE-1B-7B": Published(
        OLMOE, 6_919_161_856, 1_282_017_280, 1_178_994_688, 1_075_972_096,
        6_291_456, 373_688_320, 131_072),
    "gpt-oss-20b": Published(
        GPT_OSS_20B, 20_914_757_184, 4_187_440_704, 3_608_307_264, 3_029_173_824,
        24_891_840, 1_218_690_624, 49_152),
    "gpt-oss-120b": Published(
        GPT_OSS_120B, 116_829_156_672, 5_711_982_912, 5_132_849_472, 4_553_716_032,
        24_891_840, 1_548_424_512, 73_728),
    "Llama-4-Scout": Published(
        LLAMA4_SCOUT, 107_769_861_120, 17_172_894_720, 16_138_408_960, 15_103_923_200,
        125_829_120, 10_098_611_200, 196_608),
}
# fmt: on
