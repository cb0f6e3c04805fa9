"""Parameter counts: by hand, against published figures, against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe.accounting.params import ParameterCount, count_parameters, expert_modules
from moe.accounting.shape import AttentionShape, shape_from_config
from moe.errors import ConfigError
from tests.moe.accounting.family_cases import SMALL
from tests.moe.accounting.published import MIXTRAL_8X7B, QWEN3_30B


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


class Speaking(Tiny):
    """Says which of its parts is the head, as transformers' models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_three_ways_to_count_active_parameters() -> None:
    count = count_parameters(Speaking(tied=False))
    # 156 with embedding and head of 21 each, 135 without the embedding, 114 without both
    assert (count.active, count.active_without_input_embedding) == (156, 135)
    assert (count.active_without_embeddings, count.router, count.looked_up) == (114, 12, 21)
    count = count_parameters(Speaking(tied=True))
    # the one table is the head: it goes only with the head
    assert (count.active, count.active_without_input_embedding) == (135, 135)
    assert count.active_without_embeddings == 114
    # which part is the head is not guessed
    assert count_parameters(Tiny(tied=False)).active_without_embeddings is None


def test_a_module_without_parameters() -> None:
    assert count_parameters(nn.Identity()) == ParameterCount(0, 0, 0, 0)


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


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_local_experts": 2.0}, "num_local_experts"),
        ({"num_key_value_heads": True}, "num_key_value_heads"),
        ({"head_dim": -1}, "head_dim"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_values_that_are_no_counts_are_refused(change: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config({**MIXTRAL_8X7B, **change})
    assert [mistake.path for mistake in caught.value.mistakes] == [path]


def test_attention_has_the_width_given() -> None:
    shape = shape_from_config({**SMALL, "model_type": "llama"})
    assert shape.attention == (AttentionShape(4, 2, 6),) * 5
