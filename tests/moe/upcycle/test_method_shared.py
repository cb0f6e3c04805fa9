"""Methods with an expert that every token uses: the whole dense network, or some shards of it.

Letters: D model width, E experts, F width, G shards, S shared ones, K experts a token.
"""

from __future__ import annotations

import pytest
import torch

from moe.experts.weights import FFNWeights
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from moe.routers.configs.relu_config import ReLUConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from moe.upcycle.configs.shared_routed_config import SharedRoutedConfig
from moe.upcycle.layer_plan import Draws
from tests.moe.routers.routing_cases import build, make_ffn, make_layer, make_method, make_router

pytestmark = pytest.mark.usefixtures("one_thread")


def _numbered() -> FFNWeights:
    """D = 1, F = 8: neuron i has i + 1 in all matrices; the down bias is 100."""
    numbers = torch.arange(1.0, 9.0)
    return FFNWeights(
        numbers[:, None],
        numbers[None],
        "silu",
        gate_FD=numbers[:, None].clone(),
        b_gate_F=numbers / 10,
        b_up_F=numbers / 10,
        b_down_D=torch.tensor([100.0]),
    )


def test_the_dense_network_is_shared_and_routed_experts_add_nothing() -> None:
    ffn = make_ffn(biased=True)
    built = build(SharedDenseConfig(num_experts=3), ffn)
    assert built.shared is not None and ffn.gate_FD is not None
    for name, value in vars(ffn).items():
        kept = getattr(built.shared, name)
        assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, name
    assert not built.bank.w_down_EDF.any() and built.bank.b_down_ED is not None
    assert not built.bank.b_down_ED.any()
    for e in range(3):
        assert torch.equal(built.bank.w_up_EUD[e], torch.cat([ffn.gate_FD, ffn.up_FD]))


def test_narrow_routed_experts_take_dense_neurons_at_random() -> None:
    built = build(SharedDenseConfig(num_experts=4, expert_width=3), _numbered())
    experts = built.bank.w_up_EUD[:, :3, 0].tolist()
    assert torch.equal(built.bank.w_up_EUD[:, 3:, 0], torch.tensor(experts))
    assert all(len(set(expert)) == 3 and set(expert) <= set(range(1, 9)) for expert in experts)
    assert len({tuple(expert) for expert in experts}) > 1


def test_routed_experts_may_be_drawn() -> None:
    ffn = make_ffn(biased=True, D=32, F=64)
    bank = build(SharedDenseConfig(num_experts=4, routed="drawn", expert_width=48, init_std=0.3), ffn).bank
    # 12288 draws: a standard error of 0.6%.
    assert float(bank.w_up_EUD.std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float(bank.w_up_EUD.mean())) < 0.01
    assert bank.b_up_EU is not None and not bank.b_up_EU.any() and not bank.w_down_EDF.any()


def test_the_first_gradient_is_that_of_the_down_projection() -> None:
    # The output depends neither on the router nor on the up projections while down is 0.
    layer = make_layer(TopKConfig(balance_coef=0.0), SharedDenseConfig(num_experts=4), make_ffn())
    layer(torch.randn(32, 6, dtype=torch.float64)).square().sum().backward()
    grads = {name: float(p.grad.abs().max()) for name, p in layer.named_parameters() if p.grad is not None}
    moved = {name for name, grad in grads.items() if grad > 0}
    assert moved == {"experts.w_down_EDF", "shared.w_up_UD", "shared.w_down_DF"}
    with torch.no_grad():
        layer.experts.w_down_EDF.sub_(layer.experts.w_down_EDF.grad, alpha=0.01)
    layer.zero_grad()
    layer(torch.randn(32, 6, dtype=torch.float64)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters() if p.grad is not None)


def test_routers_have_no_gradient_among_copies() -> None:
    # The output of equal experts does not depend on weights that sum to 1: the router learns from the balance
    # loss alone until the experts, which see other tokens, differ.
    layer = make_layer(TopKConfig(balance_coef=0.0), None, make_ffn())
    layer(torch.randn(32, 6, dtype=torch.float64)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    router, experts = grads["router.weight_ED"], grads["experts.w_down_EDF"]
    assert router is not None and experts is not None
    assert float(router.abs().max()) < 1e-10 * float(experts.abs().max())


def test_shards_worked_by_hand() -> None:
    # Eight neurons in four shards of two; the first two shards are shared. Two groups of the other two; each
    # of the two experts that a token uses weighs 1/2, so that down is doubled. The bias is the shared one's.
    built = build(SharedRoutedConfig(num_experts=4), _numbered())
    assert built.shared is not None and built.shared.b_down_D is not None
    assert built.shared.up_FD.flatten().tolist() == [1, 2, 3, 4] == built.shared.down_DF.flatten().tolist()
    assert built.shared.b_down_D.tolist() == [100.0]
    assert built.bank.w_up_EUD[:, :2, 0].tolist() == [[5, 6], [7, 8]] * 2
    assert built.bank.w_down_EDF[:, 0].tolist() == [[10, 12], [14, 16]] * 2
    assert built.bank.b_down_ED is not None and not built.bank.b_down_ED.any()
    assert built.router.group_size == 2


def test_the_neurons_that_are_active_most_often_are_shared() -> None:
    rate_F = torch.tensor([0.1, 0.9, 0.2, 0.9, 0.3, 0.8, 0.0, 0.5])
    method = make_method(SharedRoutedConfig(num_experts=4, order="activation_rate"))
    assert method.statistics == ("activation_rate_F",)
    assert make_method(SharedRoutedConfig()).statistics == ()
    built = method.build(_numbered(), Draws(0, 0), {"activation_rate_F": rate_F})
    # The four highest are neurons 1, 3, 5 and 7, counted from 0.
    assert built.shared is not None and built.shared.up_FD.flatten().tolist() == [2, 4, 6, 8]
    assert built.bank.w_up_EUD[:2, :2, 0].tolist() == [[1, 3], [5, 7]]


def test_claims() -> None:
    def claims(router: TopKConfig | DeepSeekV3Config | NoisyTopKConfig, **config: int) -> bool:
        method = make_method(SharedRoutedConfig(**config), router)  # type: ignore[arg-type]
        return method.is_exact(make_router(router, E=method.config.num_experts))

    assert claims(TopKConfig())
    assert claims(TopKConfig(top_k=6), granularity=4, num_shared=1, num_experts=12)
    assert claims(DeepSeekV3Config(routed_scaling=2.5))
    assert not claims(TopKConfig(renormalise=False))
    assert not claims(TopKConfig(top_k=3))
    assert not claims(NoisyTopKConfig())
    assert make_method(SharedDenseConfig()).is_exact(make_router(TopKConfig(renormalise=False)))


def test_what_does_not_fit_is_refused() -> None:
    method = make_method(SharedRoutedConfig(granularity=5, num_shared=2, num_experts=8))
    found = method.check(TopKConfig(), ffn_shape(make_ffn(F=16)))
    # Three experts a group: neither eight experts nor two a token divide by it, nor 16 neurons by five.
    assert [m.path for m in found] == [
        "upcycle.num_experts",
        "router.top_k",
        "upcycle.granularity",
    ]
    (found_sum,) = make_method(SharedRoutedConfig()).check(ReLUConfig(), None)
    assert "differs from token to token" in found_sum.rule and "upcycle=shared_dense" in found_sum.remedy
    (wide,) = make_method(SharedDenseConfig(expert_width=11)).check(TopKConfig(), ffn_shape(make_ffn()))
    assert (wide.path, wide.value) == ("upcycle.expert_width", 11)


@pytest.mark.parametrize("shared", [0, 4])
def test_some_shards_are_shared_and_some_routed(shared: int) -> None:
    with pytest.raises(ValueError, match=f"num_shared={shared}: of granularity=4 shards at least one"):
        SharedRoutedConfig(num_shared=shared)
