"""Parameter counts: by hand, against published figures, against transformers' own models."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from moe.accounting.params import ParameterCount, count_from_shape, count_parameters, expert_modules
from moe.accounting.shape import AttentionShape, shape_from_config
from moe.errors import ConfigError


class Router(nn.Module):
    def __init__(self, num_experts: int, top_k: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width))


class Experts(nn.Module):
    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, inner))
        self.bias = nn.Parameter(torch.empty(num_experts, width))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(4, 2, 3)
        self.experts = Experts(4, 3, 5)


class Tiny(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.moe = Layer()
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_tiny_model_by_hand() -> None:
    # One expert: up 10*3 = 30, down 3*5 = 15, bias 3: 48, of which 45 in matrices. Router 4*3 = 12.
    # Norm 2*3 = 6. Embedding and head 7*3 = 21 each.
    # total  = 21 + 12 + 4*48 + 6 + 21 = 252
    # active = 21 + 12 + 2*48 + 6 + 21 = 156
    # matmul = 12 + 2*45 + 21 = 123: neither the looked-up embedding, nor bias, nor norm
    assert count_parameters(Tiny(tied=False)) == ParameterCount(252, 156, 21, 123, 192, 48)
    # Tied, the one table is counted once, and multiplied as the head.
    assert count_parameters(Tiny(tied=True)) == ParameterCount(231, 135, 21, 123, 192, 48)


def test_experts_in_a_module_list() -> None:
    layer = Layer()
    layer.experts = nn.ModuleList(nn.Linear(3, 5) for _ in range(4))
    # 4 * (15 + 5) + 12 = 92; active 2 * 20 + 12 = 52; matrices 2 * 15 + 12 = 42
    assert count_parameters(layer) == ParameterCount(92, 52, 0, 42, 80, 20)
    layer.experts.append(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="experts holds 5 experts of 1 sizes, its router knows 4"):
        count_parameters(layer)


def test_expert_modules_are_named() -> None:
    (found,) = expert_modules(Tiny(tied=False))
    assert (found.name, found.num_experts, found.top_k) == ("moe.experts", 4, 2)


def test_a_layer_that_cannot_be_counted_is_refused() -> None:
    layer = Layer()
    layer.experts.stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="shape \\(3,\\), which is not stacked over its router's 4"):
        count_parameters(layer)
    layer = Layer()
    del layer.router.top_k
    with pytest.raises(ValueError, match="Give the router these two attributes"):
        count_parameters(layer)


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
QWEN_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 14, "num_experts": 6}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "Llama", {}),
    ("llama", "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("llama", "Llama", {"tie_word_embeddings": True}),
    ("mistral", "Mistral", {"head_dim": 10, "sliding_window": 3}),
    ("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    ("qwen3", "Qwen3", {"attention_bias": True, "head_dim": 8}),
    (
        "qwen2_moe",
        "Qwen2Moe",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 22, "mlp_only_layers": [1]},
    ),
    ("qwen3_moe", "Qwen3Moe", {**QWEN_EXPERTS, "decoder_sparse_step": 2, "head_dim": 8}),
    ("olmo2", "Olmo2", {}),
    ("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    ("gemma", "Gemma", {"head_dim": 8}),
    ("gemma2", "Gemma2", {"head_dim": 8}),
    ("gemma3_text", "Gemma3", {"head_dim": 8}),
]


@pytest.mark.parametrize(("family", "name", "change"), MODELS)
def test_transformers_models_are_counted_exactly(family: str, name: str, change: dict[str, Any]) -> None:
    module = importlib.import_module(f"transformers.models.{family.removesuffix('_text')}")
    text = "Text" if family == "gemma3_text" else ""
    config = getattr(module, f"{name}{text}Config")(**{**SMALL, **change})
    with torch.device("meta"):
        model = getattr(module, f"{name}ForCausalLM")(config)
    live = count_parameters(model)
    assert live.total == sum(param.numel() for param in model.parameters())
    assert config.model_type == family
    shape = shape_from_config(config.to_dict())
    assert count_from_shape(shape) == live
    layers = [module for module in model.modules() if hasattr(module, "q_proj")]
    if family in ("mistral", "mixtral"):  # the window is handed over at each call
        windows = [config.sliding_window] * len(layers)
    else:
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
    assert [layer.sliding_window for layer in shape.attention] == [window or None for window in windows]


# Published models (Mixtral-8x7B 46.7B / 12.9B, Qwen3-30B-A3B 30.5B / 3.3B, Qwen1.5-MoE 14.3B / 2.7B), counted
# apart from this code by hand.
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}


@pytest.mark.parametrize(
    ("config", "total", "active", "without_embeddings", "expert"),
    [
        (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248, 12_617_781_248, 176_160_768),
        (QWEN3_30B, 30_532_122_624, 3_353_032_704, 2_730_702_848, 4_718_592),
        (QWEN15_MOE, 14_315_784_192, 2_689_173_504, 2_066_843_648, 8_650_752),
    ],
)
def test_published_sizes(
    config: dict[str, Any], total: int, active: int, without_embeddings: int, expert: int
) -> None:
    count = count_from_shape(shape_from_config(config))
    assert (count.total, count.active, count.per_expert) == (total, active, expert)
    assert count.active - 2 * count.embedding == without_embeddings


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='mamba': no accounting knows this family"):
        shape_from_config({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="model_type=None"):
        shape_from_config({})


def test_all_missing_keys_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config({**MIXTRAL_8X7B, "vocab_size": None, "num_local_experts": None})
    assert [mistake.path for mistake in caught.value.mistakes] == ["vocab_size", "num_local_experts"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"num_local_experts": 64}, "num_experts"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config({**QWEN3_30B, **change})
    assert caught.value.mistakes[0].path == path


def test_a_sliding_layer_needs_its_window() -> None:
    config = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, "layer_types": ["mamba"] * 5}
    with pytest.raises(ConfigError, match="no accounting knows this attention"):
        shape_from_config(config)
    with pytest.raises(ConfigError, match="layer 0 slides and needs a window"):
        shape_from_config({**config, "layer_types": ["sliding_attention"] * 5})


def test_attention_has_the_width_given() -> None:
    shape = shape_from_config({**SMALL, "model_type": "llama"})
    assert shape.attention == (AttentionShape(4, 2, 6),) * 5
