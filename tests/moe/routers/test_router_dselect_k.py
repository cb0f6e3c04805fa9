"""DSelect-k: codes worked by hand, an enumeration of all codes, static gates, and codes without an expert.

Letters: T tokens, D model width, E experts, K slots a token, J selectors, M bits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.dselect_k_config import DSelectKConfig
from moe.routers.dselect_k import DSelectKRouter, code_length, selector_probs
from moe.routing.smooth_step import smooth_step
from moe.types import Routing
from tests.moe.routers.routing_cases import label, make_context


def _by_hand(bits_JM: list[list[float]], mix_J: list[float], E: int, **fields: Any) -> DSelectKRouter:
    """A static gate of given parameters; gamma is 2, so that S(0) = 1/2 and S(0.5) = 27/32."""
    config = DSelectKConfig(gate="static", top_k=len(mix_J), gamma=2.0, **fields)
    router = DSelectKRouter(config, 1, E).double()
    with torch.no_grad():
        router.bit_bias_JM.copy_(torch.tensor(bits_JM))
        router.mix_bias_J.copy_(torch.tensor(mix_J))
    return router


def _weights(routing: Routing) -> dict[int, float]:
    used_K = routing.slot_mask_TK[0]
    return dict(
        zip(routing.expert_ids_TK[0][used_K].tolist(), routing.weights_TK[0][used_K].tolist(), strict=True)
    )


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_one_selector_worked_by_hand() -> None:
    # Most significant bit first: P(1) = 27/32 and 1/2. Codes 00, 01, 10, 11: 5/64, 5/64, 27/64, 27/64.
    router = _by_hand([[0.5, 0.0]], [0.0], 4, entropy_coef=0.5)
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 5 / 64, 1: 5 / 64, 2: 27 / 64, 3: 27 / 64}, rel=1e-7)
    # Entropy: 10/64 ln(64/5) + 54/64 ln(64/27) = 0.398352 + 0.728195
    assert routing.losses["entropy"].item() == pytest.approx(0.5 * 1.126547, rel=1e-6)
    assert set(routing.losses) == {"entropy"} and routing.metrics["hard_bits"] == 0


def test_two_hard_selectors_worked_by_hand() -> None:
    # Selector 0 spells 10 with share 3/4, selector 1 spells 11 with 1/4; if both spell 10, one is left.
    routing = _by_hand([[9.0, -9.0], [9.0, 9.0]], [math.log(3), 0.0], 4)(ONE, make_context())
    assert _weights(routing) == pytest.approx({2: 3 / 4, 3: 1 / 4}, rel=1e-7)
    assert routing.losses["entropy"] == 0 and routing.metrics["hard_bits"] == 1
    routing = _by_hand([[9.0, -9.0], [9.0, -9.0]], [math.log(3), 0.0], 4)(ONE, make_context())
    assert _weights(routing) == {2: 1.0} and routing.metrics["active_experts"] == 1


def test_three_experts_worked_by_hand() -> None:
    # Code 11 has no expert. P(1) = 27/32, then 1/2. Penalised: 5/64, 5/64, 27/64, in all 37/64.
    router = _by_hand([[0.5, 0.0]], [0.0], 3, unreachable="penalise", penalty_coef=2.0)
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 5 / 64, 1: 5 / 64, 2: 27 / 64}, rel=1e-7)
    assert routing.losses["unreachable"].item() == pytest.approx(2 / (37 / 64 + 1e-6), rel=1e-7)
    assert not router.weights_sum_to_one
    # Renormalised bit by bit: after a 1 only the 0 is left, and gets all of the 27/32.
    router = _by_hand([[0.5, 0.0]], [0.0], 3)
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 5 / 64, 1: 5 / 64, 2: 54 / 64}, rel=1e-7)
    assert set(routing.losses) == {"entropy"} and router.weights_sum_to_one


def test_a_selector_on_a_code_without_an_expert() -> None:
    # Hard on 11 of three experts: penalised, the token has no expert at all, and the gradient is 0 for ever.
    dead = _by_hand([[9.0, 9.0]], [0.0], 3, unreachable="penalise")
    routing = dead(ONE, make_context())
    assert not routing.slot_mask_TK.any() and routing.losses["unreachable"].item() == pytest.approx(1e6)
    routing.losses["unreachable"].backward()
    assert not dead.bit_bias_JM.grad.any()
    # Renormalised, it stands on the last expert below the same start.
    assert _weights(_by_hand([[9.0, 9.0]], [0.0], 3)(ONE, make_context())) == {2: 1.0}


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16])
@pytest.mark.parametrize("renormalise", [True, False])
def test_selectors_are_the_enumeration_of_codes(num_experts: int, renormalise: bool) -> None:
    T, J, M = 6, 3, math.ceil(math.log2(num_experts))
    assert code_length(num_experts) == M
    g = torch.Generator().manual_seed(num_experts)
    t_TJM = torch.randn(T, J, M, generator=g, dtype=torch.float64)
    one_TJM, zero_TJM = smooth_step(t_TJM, 3.0)

    def factor(code: str, bit: int, t: int, j: int) -> Tensor:
        """Share of a bit of a code among those halves that hold an expert."""
        shares = {"0": zero_TJM[t, j, bit], "1": one_TJM[t, j, bit]}
        if renormalise:
            other = code[:bit] + ("1" if code[bit] == "0" else "0")
            if not any(format(e, f"0{M}b").startswith(other) for e in range(num_experts)):
                return t_TJM.new_ones(())
        return shares[code[bit]]

    expected = torch.ones(T, J, num_experts, dtype=torch.float64)
    for e in range(num_experts):
        code = format(e, f"0{M}b") if M else ""
        for t in range(T):
            for j in range(J):
                for bit in range(M):
                    expected[t, j, e] *= factor(code, bit, t, j)
    found = selector_probs(one_TJM, zero_TJM, num_experts, renormalise=renormalise)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    if renormalise:
        torch.testing.assert_close(found.sum(-1), torch.ones(T, J).double(), rtol=1e-14, atol=0)
    assert (found.sum(-1) <= 1 + 1e-14).all()


@pytest.mark.parametrize("num_experts", [3, 8])
def test_gates_mix_the_selectors(num_experts: int) -> None:
    D, T = 5, 9
    router = DSelectKRouter(DSelectKConfig(top_k=3), D, num_experts).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    x_TD = torch.randn(T, D, generator=g, dtype=torch.float64)
    routing = router(x_TD, make_context())
    for t in range(T):
        bits_JM = torch.einsum("jmd,d->jm", router.bit_weight_JMD, x_TD[t]) + router.bit_bias_JM
        mix_J = (router.mix_weight_JD @ x_TD[t] + router.mix_bias_J).softmax(0)
        one, zero = smooth_step(bits_JM, 1.0)
        chosen_JE = selector_probs(one[None], zero[None], num_experts, renormalise=True)[0]
        torch.testing.assert_close(routing.scores_TE[t], mix_J @ chosen_JE, rtol=1e-12, atol=1e-15)
    mean = routing.losses["entropy"] / 0.1
    one, zero = smooth_step(
        torch.einsum("jmd,td->tjm", router.bit_weight_JMD, x_TD) + router.bit_bias_JM, 1.0
    )
    chosen_TJE = selector_probs(one, zero, num_experts, renormalise=True)
    torch.testing.assert_close(mean, torch.special.entr(chosen_TJE).sum() / T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("unreachable", ["renormalise", "penalise"])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 8])
def test_static_gates_are_the_same_for_every_token(unreachable: str, num_experts: int) -> None:
    config = DSelectKConfig(gate="static", top_k=min(2, num_experts), unreachable=unreachable)
    router = DSelectKRouter(config, 6, num_experts)
    router.reset_parameters(torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    routing = router(torch.randn(7, 6, generator=g), make_context())
    other = router(1e5 * torch.randn(7, 6, generator=g), make_context())
    assert torch.equal(routing.scores_TE, other.scores_TE)
    assert torch.equal(routing.scores_TE, routing.scores_TE[:1].expand(7, -1))
    assert router(torch.zeros(0, 6), make_context()).weights_TK.shape[0] == 0
    if router.weights_sum_to_one:
        torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(7))
    if num_experts > 2:
        (routing.weights_TK[:, 0].sum() + sum(routing.losses.values())).backward()
        assert all(parameter.grad.any() for parameter in router.parameters())


def test_static_gates_harden_to_k_experts_by_their_entropy() -> None:
    router = DSelectKRouter(DSelectKConfig(gate="static", top_k=2, entropy_coef=1.0), 1, 8)
    router.reset_parameters(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    active = []
    for _ in range(60):
        routing = router(torch.ones(1, 1), make_context())
        active.append(int(routing.metrics["active_experts"]))
        optimizer.zero_grad()
        routing.losses["entropy"].backward()
        optimizer.step()
    assert active[0] == 8 and active[-1] <= 2 and active == sorted(active, reverse=True)


def test_hard_bits_get_no_gradient_and_soft_ones_do() -> None:
    router = _by_hand([[9.0, 0.1], [0.2, -9.0]], [0.3, 0.1], 4, entropy_coef=1.0)
    routing = router(ONE, make_context())
    (routing.weights_TK[0, 0] * 3 + routing.losses["entropy"]).backward()
    grad_JM = router.bit_bias_JM.grad
    assert torch.equal(grad_JM != 0, torch.tensor([[False, True], [True, False]]))
    assert router.mix_bias_J.grad.all()


CONFIGS = [
    DSelectKConfig(gamma=3.0),
    DSelectKConfig(gamma=3.0, unreachable="penalise"),
    DSelectKConfig(gamma=3.0, gate="static"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("num_experts", [3, 4, 5])
def test_gradients_agree_with_finite_differences(config: DSelectKConfig, num_experts: int) -> None:
    router = DSelectKRouter(config, 3, num_experts).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    x_TD = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    upstream_TE = torch.randn(4, num_experts, generator=g, dtype=torch.float64)
    names = [name for name, _ in router.named_parameters()]

    def total(x_TD: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        routing = torch.func.functional_call(router, values, (x_TD, make_context()))
        return (routing.scores_TE * upstream_TE).sum() + sum(routing.losses.values())

    assert torch.autograd.gradcheck(total, (x_TD, *router.parameters()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0: a token needs at least one selector"),
        ({"gamma": -1.0}, "gamma=-1.0: the band has a width"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1: a coefficient is not negative"),
        ({"penalty_coef": -0.1}, "penalty_coef=-0.1: a coefficient is not negative"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSelectKConfig(**fields)
    assert "Set router.top_k to 4 or less" in str(DSelectKConfig(top_k=5).check(4))
