"""Low-rank factors beside experts: what trains, what it costs, and where it begins."""

from __future__ import annotations

import pytest
import torch

from kernels.plan.row_plan import make_plan
from moe.accounting.params import count_parameters
from moe.accounting.training import MoEBlock, used_flops_per_token
from moe.dispatch.base import Dispatched
from moe.experts.experts import Experts
from moe.experts.lora import DRAWN, FACTORS, drawn_factor, merged
from moe.experts.lora_config import LoraConfig
from moe.routers.configs.topk_config import TopKConfig
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import build_optimizer
from tests.moe.dispatch.dispatch_cases import make_experts
from tests.moe.routers.routing_cases import make_layer

LORA = LoraConfig(rank=2, alpha=3.0)


def _sent(dtype: torch.dtype = torch.float64) -> Dispatched:
    generator = torch.Generator().manual_seed(1)
    rows_ND = torch.randn(20, 6, generator=generator, dtype=dtype)
    ids_NK = torch.randint(0, 8, (20, 2), generator=generator)
    return Dispatched(rows_ND, torch.rand(20, 2, generator=generator), make_plan(ids_NK, 8))


def _with_factors(dtype: torch.dtype = torch.float64) -> Experts:
    """Factors as training makes them: none is zero."""
    experts = make_experts(True, dtype)
    experts.add_low_rank(LORA)
    generator = torch.Generator().manual_seed(2)
    for names in FACTORS.values():
        for name in names:
            factor = getattr(experts, name)
            factor.data.copy_(torch.randn(factor.shape, generator=generator))
    return experts


def test_factors_of_zero_keep_the_function_to_the_last_bit() -> None:
    plain, experts = make_experts(True, torch.float64), make_experts(True, torch.float64)
    experts.add_low_rank(LORA)
    assert torch.equal(experts(_sent()), plain(_sent()))


def test_weights_are_frozen_and_factors_train() -> None:
    experts = _with_factors()
    E, D, F = experts.shape
    U = 2 * F
    named = dict(experts.named_parameters())
    trained = {name: tuple(p.shape) for name, p in named.items() if p.requires_grad}
    assert trained == {
        "lora_a_up_ErD": (E, 2, D),
        "lora_b_up_EUr": (E, U, 2),
        "lora_a_down_ErF": (E, 2, F),
        "lora_b_down_EDr": (E, D, 2),
    }
    experts(_sent()).sum().backward()
    for name, parameter in named.items():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name
    optimizer = build_optimizer(experts, OptimConfig())
    state = optimizer.state_tensors(named.items())
    assert {key.split(".")[1] for key in state} == set(trained)
    # The gate's rows stand above the value's in B as in W: what orthogonalises takes them apart.
    assert experts.fused_rows == {"w_up_EUD": 2, "lora_b_up_EUr": 2}


def test_merged_weights_compute_what_factors_do() -> None:
    experts, plain = _with_factors(), make_experts(True, torch.float64)
    for weight, (a, b) in FACTORS.items():
        before = getattr(experts, weight)
        whole = merged(before, getattr(experts, a), getattr(experts, b), 1.5)
        getattr(plain, weight).data.copy_(whole)
        # By hand: alpha / r = 3 / 2, expert 3.
        by_hand = before[3] + 1.5 * getattr(experts, b)[3] @ getattr(experts, a)[3]
        torch.testing.assert_close(whole[3], by_hand)
    torch.testing.assert_close(plain(_sent()), experts(_sent()), rtol=1e-11, atol=1e-11)


def test_meta_weights_get_meta_factors() -> None:
    experts = make_experts(True, torch.float32).to("meta")
    experts.add_low_rank(LORA)
    assert all(parameter.is_meta for parameter in experts.parameters())


def test_draws_depend_on_their_place_alone() -> None:
    draws = {
        (layer, name, expert): drawn_factor(5, layer, name, expert, (4, 6400))
        for layer in (0, 1)
        for name in sorted(DRAWN)
        for expert in (0, 1)
    }
    for place, draw in draws.items():
        assert torch.equal(draw, drawn_factor(5, *place, (4, 6400)))
        # Variance 1 / I; of 25600 draws the standard deviation is off by 0.4% (one sigma).
        assert float(draw.std()) == pytest.approx(1 / 80, rel=0.03)
    assert len({float(draw[0, 0]) for draw in draws.values()}) == len(draws)


def test_what_the_config_and_the_widths_refuse() -> None:
    with pytest.raises(ValueError, match=r"rank=-1: must be 0 or more.*\nalpha=0: must be above 0"):
        LoraConfig(rank=-1, alpha=0)
    assert LoraConfig().scale == 0 and LORA.scale == 1.5
    assert LoraConfig(rank=6).unsupported_reason(6, 10) is None
    assert "their rank is at most 6" in str(LoraConfig(rank=7).unsupported_reason(6, 10))


def test_a_step_does_not_count_products_of_gradients_that_nobody_wants() -> None:
    layer = make_layer(TopKConfig(top_k=2))
    before = count_parameters(layer)
    layer.experts.add_low_rank(LORA)
    after = count_parameters(layer)
    E, D, F = layer.experts.shape
    K, one, factors = 2, 3 * D * F, 2 * (D + 2 * F) + 2 * (F + D)
    assert (before.frozen, after.frozen) == (0, K * one)
    assert after.matmul - before.matmul == K * factors
    assert after.total - before.total == E * factors
    # Three slots a token where two were counted: three products with the factors, two with what is frozen.
    moe = MoEBlock(E, K, one + factors, one + factors, factors, frozen=one)
    assert used_flops_per_token(0.0, [moe], [3.0]) == 2 * (3 * factors + 2 * one)
