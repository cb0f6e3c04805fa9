"""Virtual groups: shards, router rows, factors and what is refused.

Letters: D model width, E experts, F width, G shards of a copy, K experts a token.
"""

from __future__ import annotations

import pytest
import torch

from moe.experts.weights import FFNWeights
from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.expert_choice_config import ExpertChoiceConfig
from moe.routers.configs.gshard_config import GShardConfig
from moe.routers.configs.hash_config import HashConfig
from moe.routers.configs.mutual_choice_config import MutualChoiceConfig
from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.deepseek_v3 import DeepSeekV3Router
from moe.types import LayerContext, RouterContext
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from tests.moe.routers.routing_cases import build, make_ffn, make_layer, make_method, make_router

pytestmark = pytest.mark.usefixtures("one_thread")

# D = 1, F = 4, no gate: down(relu(up x)), with a bias of 6.
_BY_HAND = FFNWeights(
    up_FD=torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
    down_DF=torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
    activation="relu",
    b_up_F=torch.tensor([0.1, 0.2, 0.3, 0.4]),
    b_down_D=torch.tensor([6.0]),
)


def test_shards_worked_by_hand() -> None:
    # Four experts, two shards: two copies, shard n % 2 in expert n. Weights sum to 1, so each of the two
    # experts that a token uses weighs 1/2, and down is doubled.
    bank = build(VirtualGroupConfig(num_experts=4), _BY_HAND).bank
    assert bank.w_up_EUD.squeeze(-1).tolist() == [[1.0, 2.0], [3.0, 4.0]] * 2
    assert bank.w_down_EDF.squeeze(1).tolist() == [[20.0, 40.0], [60.0, 80.0]] * 2
    assert bank.b_up_EU is not None and bank.b_down_ED is not None
    torch.testing.assert_close(bank.b_up_EU, torch.tensor([[0.1, 0.2], [0.3, 0.4]] * 2))
    assert bank.b_down_ED.tolist() == [[6.0]] * 4


def test_weights_that_are_not_renormalised_worked_by_hand() -> None:
    # The paper's rule: E G^2 / T with E = 2 copies, G = 2, T = 2, that is 4. The bias is counted by weights
    # of 1/4 each and twice, half in all, so that it is doubled.
    router = TopKConfig(renormalise=False)
    bank = build(VirtualGroupConfig(num_experts=4), _BY_HAND, router).bank
    assert bank.w_down_EDF.squeeze(1).tolist() == [[40.0, 80.0], [120.0, 160.0]] * 2
    assert bank.b_down_ED is not None and bank.b_down_ED.tolist() == [[12.0]] * 4


@pytest.mark.parametrize(("copies", "shards", "top_k"), [(8, 8, 8), (8, 1, 2), (4, 2, 4)])
def test_the_factor_is_that_of_the_paper(copies: int, shards: int, top_k: int) -> None:
    # E8G8T8: 8 * 64 / 8 = 64. E8G1T2: 8 * 1 / 2 = 4. E4G2T4: 4 * 4 / 4 = 4.
    ffn = make_ffn(F=16)
    config = VirtualGroupConfig(num_experts=copies * shards, granularity=shards)
    for renormalise, factor in ((True, shards), (False, copies * shards**2 / top_k)):
        bank = build(config, ffn, TopKConfig(top_k=top_k, renormalise=renormalise)).bank
        shard = ffn.down_DF[:, : 16 // shards]
        torch.testing.assert_close(bank.w_down_EDF[0], shard * factor)


@pytest.mark.parametrize(
    # Three matrices share the factor where there is a gate or a square, two elsewhere: 2^(1/3) and 2^(1/2).
    ("gated", "activation", "root"),
    [(True, "silu", 2 ** (1 / 3)), (False, "relu2", 2 ** (1 / 3)), (False, "gelu", 2**0.5)],
)
def test_roots_of_the_factor(gated: bool, activation: str, root: float) -> None:
    ffn = make_ffn(gated, biased=True, activation=activation)
    bank = build(VirtualGroupConfig(scale="cube_root"), ffn).bank
    torch.testing.assert_close(bank.w_down_EDF[0], ffn.down_DF[:, :5] * root)
    torch.testing.assert_close(bank.w_up_EUD[0, -5:], ffn.up_FD[:5] * root)
    assert bank.b_up_EU is not None and ffn.b_up_F is not None
    torch.testing.assert_close(bank.b_up_EU[0, -5:], ffn.b_up_F[:5] * root)


def test_the_root_is_exact_where_the_network_is_homogeneous() -> None:
    # relu2 is of degree 2: the factor's cube root counts three times. Not claimed, for want of the shape.
    ffn = make_ffn(False, activation="relu2")
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    layer = make_layer(TopKConfig(), VirtualGroupConfig(scale="cube_root"), ffn).eval()
    dense_TD = (x_TD @ ffn.up_FD.t()).relu().square() @ ffn.down_DF.t()
    torch.testing.assert_close(layer(x_TD).detach(), dense_TD, rtol=1e-12, atol=1e-12)


def test_rows_of_a_group_are_one_row_and_those_of_groups_differ() -> None:
    layer = make_layer(TopKConfig(top_k=4), VirtualGroupConfig(num_experts=12, granularity=4), make_ffn(F=16))
    rows_ED = layer.router.rows_ED()
    assert rows_ED is not None
    groups = rows_ED.view(3, 4, 6)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len({tuple(row) for row in groups[:, 0].tolist()}) == 3
    # The rows that were drawn for the first three experts.
    drawn = make_router(TopKConfig(top_k=4), 6, 12).rows_ED()
    assert drawn is not None and torch.equal(groups[:, 0].float(), drawn[:3])


def test_a_balancing_bias_moves_alike_within_a_group() -> None:
    # Tied experts get the same tokens, so that the bias parts no group before their rows differ.
    layer = make_layer(DeepSeekV3Config(bias_rate=0.1), VirtualGroupConfig(num_experts=8), make_ffn(F=16))
    router = layer.router.train()
    assert isinstance(router, DeepSeekV3Router)
    for step in range(5):
        context = LayerContext(RouterContext(step=step), 0)
        router(torch.randn(64, 6, dtype=torch.float64), context)
        router.after_optimizer_step(context)
    pairs = router.bias_E.view(4, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1]) and bool(pairs.any())


@pytest.mark.parametrize(
    ("router", "config", "option", "rule"),
    [
        (
            TopKConfig(top_k=12),
            {"num_experts": 64, "granularity": 8},
            "router.top_k",
            "whole virtual groups, of 8",
        ),
        (
            TopKConfig(),
            {"num_experts": 9},
            "upcycle.num_experts",
            "no multiple of the 2 experts of a virtual",
        ),
        (TopKConfig(top_k=3), {"granularity": 3, "num_experts": 9}, "upcycle.granularity", "the 16 neurons"),
        (
            NoisyTopKConfig(),
            {},
            "router.noise_scale",
            "in training it separates the experts",
        ),
        (GShardConfig(second="sampled"), {}, "router.second", "in training it separates"),
        (MutualChoiceConfig(), {}, "router.name", "in training it separates"),
        # Two groups of three experts cut the second of three virtual groups of two.
        (DeepSeekV3Config(num_groups=2), {"num_experts": 6}, "router.num_groups", "it separates the experts"),
        (HashConfig(top_k=2), {}, "router.name", "no row for each expert"),
        (ExpertChoiceConfig(), {}, "router.name", "differs from token to token"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_does_not_fit_is_refused_by_name(
    router: RouterConfig, config: dict[str, object], option: str, rule: str
) -> None:
    method = make_method(VirtualGroupConfig(**config), router)  # type: ignore[arg-type]
    found = method.check(router, ffn_shape(make_ffn(F=16)))
    assert [mistake.path for mistake in found] == [option]
    assert rule in found[0].rule
    assert found[0].remedy.startswith(("Set ", "Choose "))


def test_claims() -> None:
    def claims(router: RouterConfig, **config: object) -> bool:
        method = make_method(VirtualGroupConfig(**config), router)  # type: ignore[arg-type]
        return method.is_exact(make_router(router, E=method.config.num_experts))

    assert claims(TopKConfig()) and claims(TopKConfig(score="sigmoid"))
    assert claims(TopKConfig(top_k=4), granularity=4)
    assert claims(TopKConfig(top_k=8), granularity=4, num_experts=16)
    # Scaled weights have one sum, 2.5, and the factor is 2 / 2.5.
    assert claims(DeepSeekV3Config(routed_scaling=2.5))
    assert not claims(TopKConfig(renormalise=False))
    assert not claims(TopKConfig(), scale="cube_root")
    assert not claims(TopKConfig(), scale="none")
    assert not claims(TopKConfig(top_k=3), granularity=2)
    assert not claims(NoisyTopKConfig())


def test_no_shard_is_no_granularity() -> None:
    with pytest.raises(ValueError, match="granularity=0: a copy is at least one shard. Set it to 1 or more"):
        VirtualGroupConfig(granularity=0)


def test_a_plan_needs_the_router() -> None:
    from moe.upcycle.virtual_group import VirtualGroup

    with pytest.raises(AssertionError, match=r"call for_router\(config\) first"):
        _ = VirtualGroup(VirtualGroupConfig()).gates
