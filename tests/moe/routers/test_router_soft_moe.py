"""Soft MoE: mixtures by hand, the layer against its formula, and gradients.

Letters: T tokens, D model width, E experts, B sequences, S tokens a sequence, N slots.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe.routers.configs.soft_moe_config import SoftMoEConfig
from moe.routers.soft_moe import SoftDispatcher, SoftMoERouter, SoftRouting
from tests.moe.routers.routing_cases import make_context, make_layer


def _router(E: int = 2, P: int = 1, D: int = 2, scale: float = 1.0) -> SoftMoERouter:
    router = SoftMoERouter(SoftMoEConfig(slots_per_expert=P), D, E)
    with torch.no_grad():
        router.scale.fill_(scale)
    return router


def test_shares_worked_by_hand() -> None:
    router = _router(scale=2.0)
    with torch.no_grad():
        router.phi_EPD.copy_(torch.tensor([[[5.0, 0.0]], [[0.0, 0.1]]]))
    # Directions [1, 0] and [0, 1] whatever the lengths: logits [2, 0] and [0, 2].
    routing = router(torch.tensor([[3.0, 0.0], [0.0, 7.0]]), make_context())
    assert isinstance(routing, SoftRouting) and routing.combine_BSN is not None
    assert routing.dispatch_BSN is not None
    high = 1 / (1 + math.exp(-2))
    expected = torch.tensor([[[high, 1 - high], [1 - high, high]]])
    torch.testing.assert_close(routing.combine_BSN, expected)
    torch.testing.assert_close(routing.dispatch_BSN, expected)
    # As a Routing: what each token gets of each expert.
    assert routing.expert_ids_TK.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(routing.weights_TK, expected[0])


def test_several_slots_of_an_expert_add_up() -> None:
    routing = _router(E=3, P=4, D=5)(torch.randn(6, 5), make_context())
    assert isinstance(routing, SoftRouting) and routing.combine_BSN is not None
    torch.testing.assert_close(routing.weights_TK, routing.combine_BSN.view(6, 3, 4).sum(-1))
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(6))


def _formula(layer_x: Tensor, layer: torch.nn.Module, mask: Tensor | None = None) -> Tensor:
    """Eq. 1-3 of the paper, sequence by sequence and slot by slot."""
    phi_EPD, scale = layer.router.phi_EPD, layer.router.scale
    out = []
    for b, x_SD in enumerate(layer_x):
        real = torch.ones(len(x_SD), dtype=torch.bool) if mask is None else mask[b]
        unit_SD = x_SD / x_SD.norm(dim=-1, keepdim=True)
        total = torch.zeros_like(x_SD)
        logits = torch.stack(
            [scale * (unit_SD @ (phi / phi.norm())) for expert in phi_EPD for phi in expert], dim=1
        ).squeeze(-1)
        combine = logits.exp() / logits.exp().sum(1, keepdim=True)
        dispatch = logits.exp() * real[:, None] / (logits.exp() * real[:, None]).sum(0)
        for slot in range(logits.shape[1]):
            e = slot // phi_EPD.shape[1]
            mixed = (dispatch[:, slot, None] * x_SD).sum(0)
            gate, up = (layer.experts.w_up_EUD[e] @ mixed).chunk(2)
            y = layer.experts.w_down_EDF[e] @ (torch.nn.functional.silu(gate) * up)
            total = total + combine[:, slot, None] * y
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("padded", [False, True])
def test_layer_computes_the_formula_with_its_gradients(padded: bool) -> None:
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]]) if padded else None
    layer = make_layer(SoftMoEConfig(slots_per_expert=3), padding_mask=mask)
    with torch.no_grad():
        # Copies would not show which expert a slot went to.
        layer.experts.w_up_EUD.normal_()
        layer.router.scale.fill_(3)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    upstream = torch.randn(2, 5, 6, dtype=torch.float64)
    gradients, outputs = [], []
    for compute in (layer, lambda leaf: _formula(leaf, layer, mask)):
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad((out * upstream).sum(), [leaf, *layer.parameters()]))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_experts_see_slots() -> None:
    layer = make_layer(SoftMoEConfig(slots_per_expert=3)).eval()
    assert isinstance(layer.dispatcher, SoftDispatcher)
    layer.context.run.token_ids = torch.zeros(2, 5, dtype=torch.int64)
    x_TD = torch.randn(10, 6, dtype=torch.float64)
    sent = layer.dispatcher.dispatch(x_TD, layer.router(x_TD, layer.context))
    # Two sequences of 4 experts with 3 slots each
    assert sent.rows_ND.shape == (24, 6) and sent.plan.counts_E.tolist() == [6, 6, 6, 6]


def test_sequences_do_not_mix() -> None:
    layer = make_layer(SoftMoEConfig(slots_per_expert=2)).eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    other = torch.cat([x[:1], torch.randn(1, 5, 6, dtype=torch.float64)])
    torch.testing.assert_close(layer(other)[0], layer(x)[0], rtol=1e-12, atol=1e-14)


def test_figures() -> None:
    # Equal tokens: a slot takes 1/4 of each; D = 2 with slots along the axes and x along the first.
    router = _router(scale=1.0)
    with torch.no_grad():
        router.phi_EPD.copy_(torch.eye(2).view(2, 1, 2))
    metrics = router(torch.tensor([[1.0, 0.0]]).expand(4, 2), make_context()).metrics
    high = math.e / (math.e + 1)
    assert {n: float(v) for n, v in metrics.items()} == pytest.approx(
        {"slot_sharpness": 0.25, "token_sharpness": high}
    )


def test_it_says_what_it_is_not() -> None:
    assert not SoftMoERouter.is_causal
    assert not _router().weights_sum_to_one and _router().top_k == 1
    with pytest.raises(ValueError, match="slots_per_expert=0: an expert sees something. Set it to 1 or more"):
        SoftMoEConfig(slots_per_expert=0)
