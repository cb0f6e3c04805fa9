"""Experts that are slices of shuffled replicas, and experts that divide the dense neurons among them.

Letters: D model width, E experts, F width, K experts a token.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moe.experts.weights import ExpertBank, FFNWeights
from moe.routers.configs import RouterConfig
from moe.routers.configs.forced_config import ForcedConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.build_experts import build_layer, ffn_shape
from moe.upcycle.configs.partition_config import PartitionConfig
from moe.upcycle.configs.shuffle_slice_config import ShuffleSliceConfig
from moe.upcycle.gates import Gates
from moe.upcycle.layer_plan import Draws
from moe.upcycle.partition import is_whole, parts_plan
from tests.moe.routers.routing_cases import build, make_ffn, make_layer, make_method, make_router

pytestmark = pytest.mark.usefixtures("one_thread")


def _numbered(width: int) -> FFNWeights:
    """D = 1: neuron i has i + 1 in all matrices."""
    numbers = torch.arange(1.0, width + 1)
    return FFNWeights(numbers[:, None], numbers[None], "silu", gate_FD=numbers[:, None].clone())


def _neurons(bank: ExpertBank) -> list[list[float]]:
    """The number of each neuron of each expert."""
    F = bank.w_down_EDF.shape[2]
    gate_EF, up_EF = bank.w_up_EUD[:, :F, 0], bank.w_up_EUD[:, F:, 0]
    assert torch.equal(gate_EF, up_EF)
    return up_EF.tolist()


def test_slices_run_through_shuffled_replicas() -> None:
    # Five experts of three out of four neurons: ceil(15 / 4) = 4 replicas, whose last neuron is left over.
    bank = build(ShuffleSliceConfig(num_experts=5, expert_width=3, ratio=0.0), _numbered(4)).bank
    row = [number for expert in _neurons(bank) for number in expert]
    assert bank.w_down_EDF[:, 0].flatten().tolist() == row
    replicas = [row[start : start + 4] for start in range(0, 15, 4)]
    assert all(sorted(replica) == [1, 2, 3, 4] for replica in replicas[:3]) and len(set(replicas[3])) == 3
    assert len({tuple(replica) for replica in replicas[:3]}) > 1, "replicas are shuffled alike"


def test_half_of_each_expert_is_drawn_anew() -> None:
    config = ShuffleSliceConfig(num_experts=4, expert_width=8)
    bank = build(config, _numbered(16)).bank
    for expert in range(4):
        kept = [
            {i for i, value in enumerate(row) if value in range(1, 17)}
            for row in (
                bank.w_up_EUD[expert, :8, 0].tolist(),
                bank.w_up_EUD[expert, 8:, 0].tolist(),
                bank.w_down_EDF[expert, 0].tolist(),
            )
        ]
        assert len(kept[0]) == 4 and kept[0] == kept[1] == kept[2]


def test_slices_are_half_as_wide_by_default_and_never_wider_than_the_network() -> None:
    assert build(ShuffleSliceConfig(), make_ffn(F=16)).bank.w_down_EDF.shape == (8, 6, 8)
    method = make_method(ShuffleSliceConfig(expert_width=17))
    (found,) = method.check(TopKConfig(), ffn_shape(make_ffn(F=16)))
    assert (found.path, found.value, found.remedy) == (
        "upcycle.expert_width",
        17,
        "Set 16 or less, or null.",
    )


@pytest.mark.parametrize("split", ["random", "contiguous"])
def test_every_neuron_is_in_one_expert(split: str) -> None:
    bank = build(PartitionConfig(num_experts=4, split=split), _numbered(12)).bank  # type: ignore[arg-type]
    experts = _neurons(bank)
    assert Counter(number for expert in experts for number in expert) == Counter(range(1, 13))
    runs = [[float(3 * e + i) for i in (1, 2, 3)] for e in range(4)]
    assert (experts == runs) == (split == "contiguous")


def test_the_factor_is_folded_into_the_down_projection() -> None:
    # LLaMA-MoE's E / K = 4 / 2, unless it is given.
    for config, factor in (
        (PartitionConfig(num_experts=4, split="contiguous"), 2.0),
        (PartitionConfig(num_experts=4, split="contiguous", scale_factor=3.0), 3.0),
    ):
        bank = build(config, _numbered(4), TopKConfig(top_k=2)).bank
        assert bank.w_down_EDF.flatten().tolist() == [factor * number for number in (1, 2, 3, 4)]
        assert bank.w_up_EUD[:, 0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("biased", [True, False])
def test_a_division_is_exact_only_where_all_experts_count_once(biased: bool) -> None:
    # All four experts at 1/4 each, and a factor of 4.
    ffn = make_ffn(biased=biased, F=16)
    whole: RouterConfig = ForcedConfig(top_k=4)
    config = PartitionConfig(num_experts=4, scale_factor=4.0)
    assert make_method(config, whole).is_exact(make_router(whole))
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    layer, dense = make_layer(whole, config, ffn).eval(), make_layer(TopKConfig(), None, ffn).eval()
    torch.testing.assert_close(layer(x_TD), dense(x_TD), rtol=1e-12, atol=1e-12)
    # LLaMA-MoE's own factor, E / K = 1, leaves a quarter.
    assert not make_method(PartitionConfig(num_experts=4), whole).is_exact(make_router(whole))
    for other in (TopKConfig(top_k=4), ForcedConfig(top_k=2)):
        assert not make_method(config, other).is_exact(make_router(other))


def test_parts_of_one_size_or_none() -> None:
    (found,) = make_method(PartitionConfig(num_experts=3)).check(TopKConfig(), ffn_shape(make_ffn()))
    assert (found.path, found.value) == ("upcycle.num_experts", 3)
    assert "the 10 neurons of the dense network do not divide into 3 parts" in found.rule


def test_parts_that_others_have_found() -> None:
    # Two experts of two neurons beside a shared one of two, at weight 1 each: the whole network, bias once.
    gates = Gates(top_k=2, total=2.0, constant=True, has_rows=False, alike=1.0)
    parts = [torch.tensor([5, 0]), torch.tensor([3, 1])]
    plan = parts_plan(parts, 1.0, gates, shared_F=torch.tensor([2, 4]))
    ffn = _numbered(6)
    built = build_layer(plan, [ffn], Draws(0, 0))
    assert _neurons(built.bank) == [[6.0, 1.0], [4.0, 2.0]]
    assert built.shared is not None and built.shared.up_FD.flatten().tolist() == [3.0, 5.0]
    assert [expert.down_bias for expert in plan.experts] == [0.0, 0.0]
    assert plan.shared is not None and plan.shared.down_bias == 1.0
    # Without a shared expert the bias is counted by the weights, which sum to 2.
    assert [expert.down_bias for expert in parts_plan(parts, 1.0, gates).experts] == [0.5, 0.5]
    assert is_whole(gates, 2, 1.0) and not is_whole(gates, 3, 1.0) and not is_whole(gates, 2, 2.0)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (PartitionConfig, {"scale_factor": 0.0}, "scale_factor=0.0: experts that count nothing cannot learn"),
        (ShuffleSliceConfig, {"expert_width": 0}, "expert_width=0: must be at least 1. Or leave it at null"),
        (ShuffleSliceConfig, {"ratio": 2.0}, "ratio=2.0: it is a share of the neurons"),
    ],
)
def test_refused_configs(config: type, given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)
