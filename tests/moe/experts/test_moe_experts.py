"""The experts' module: which back end and dtype it runs in, and what the optimizer is told. And dispatch.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import BACKENDS, BackendError
from kernels.third_party import THIRD_PARTY
from moe.dispatch import Dispatched, Dispatcher, dispatcher_classes
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.experts_config import ExpertsConfig
from moe.experts.weights import ExpertBank
from moe.types import Routing
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.layer_plan import Draws
from tests.moe.routers.routing_cases import make_ffn, make_method

D, F, E = 8, 16, 3


def _bank(dtype: torch.dtype = torch.float32, gated: bool = True, biased: bool = False) -> ExpertBank:
    ffn = make_ffn(gated, biased, D=D, F=F)
    bank = make_method(CopyConfig(num_experts=E, noise_std=0.5)).build(ffn, Draws(0, 0)).bank
    return replace(
        bank,
        w_up_EUD=bank.w_up_EUD.to(dtype),
        w_down_EDF=bank.w_down_EDF.to(dtype),
        b_up_EU=None if bank.b_up_EU is None else bank.b_up_EU.to(dtype),
        b_down_ED=None if bank.b_down_ED is None else bank.b_down_ED.to(dtype),
    )


def _routing(mask_TK: Tensor | None = None) -> Routing:
    ids_TK = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2], [2, 1]])
    weights_TK = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    return Routing(ids_TK, weights_TK, E, slot_mask_TK=mask_TK)


def _tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def _sent(dtype: torch.dtype = torch.float32) -> Dispatched:
    return LocalDispatcher().dispatch(_tokens(dtype), _routing())


def test_an_unknown_back_end_is_refused_in_the_config() -> None:
    with pytest.raises(ValueError, match="'fast': is no back end. Choose one of: auto, cpu, deepgemm, "):
        ExpertsConfig(backend="fast")
    for name in ("auto", *BACKENDS):
        assert ExpertsConfig(backend=name).backend == name


# Those that say so on a CPU, or that their library is not installed; every other must run there.
NEED_A_GPU = ("triton", *THIRD_PARTY)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_forced_back_end_is_the_one_that_runs_or_refuses(name: str) -> None:
    experts = Experts(_bank(), backend=name)
    assert experts.backend_choice() is None
    if name in NEED_A_GPU:
        with pytest.raises(BackendError, match=f"the back end '{name}' cannot run this"):
            experts(_sent())
        return
    expected = Experts(_bank(), backend="loop")(_sent())
    torch.testing.assert_close(experts(_sent()), expected)
    choice = experts.backend_choice()
    assert choice is not None and choice.backend is BACKENDS[name]


def test_a_forced_back_end_that_cannot_run_refuses_by_name() -> None:
    with pytest.raises(BackendError, match="the back end 'grouped_mm' cannot run this: .*takes no bias"):
        Experts(_bank(biased=True), backend="grouped_mm")(_sent())
    with pytest.raises(BackendError, match=r"the back end 'cpu' cannot run this: .*not torch\.float16"):
        Experts(_bank(torch.float16), backend="cpu")(_sent(torch.float16))
    # What runs in one dtype is asked again for the next.
    experts = Experts(_bank(), backend="cpu")
    experts(_sent())
    with pytest.raises(BackendError, match=r"not torch\.float16"):
        experts(_sent(torch.float16))


@pytest.mark.parametrize("which", ["b_up_EU", "b_down_ED"])
def test_a_single_bias_is_a_bias(which: str) -> None:
    # A back end without biases must not be chosen and then leave this one out.
    both = _bank(torch.float16, biased=True)
    bank = replace(both, **{name: None for name in ("b_up_EU", "b_down_ED") if name != which})
    with pytest.raises(BackendError, match="takes no bias"):
        Experts(bank, backend="grouped_mm")(_sent(torch.float16))
    found = Experts(bank)(_sent(torch.float16))
    assert torch.equal(found, Experts(bank, backend="loop")(_sent(torch.float16)))
    without = replace(bank, b_up_EU=None, b_down_ED=None)
    assert not torch.allclose(found, Experts(without)(_sent(torch.float16)))


def test_autocast_decides_the_dtype() -> None:
    experts = Experts(_bank())
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(_sent())
    assert found.dtype == torch.bfloat16
    expected = Experts(_bank(torch.bfloat16))(_sent(torch.bfloat16))
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    # Each dtype has its own choice; the last one asked for is reported.
    choice = experts.backend_choice()
    assert choice is not None and "bfloat16" in choice.reason


@pytest.mark.parametrize(("gated", "fused"), [(True, {"w_up_EUD": 2}), (False, {})])
def test_what_the_optimizer_is_told(gated: bool, fused: dict[str, int]) -> None:
    experts = Experts(_bank(gated=gated, biased=True))
    assert experts.parameter_role == "expert" and experts.fused_rows == fused
    names = {name for name, _ in experts.named_parameters()}
    assert names == {"w_up_EUD", "w_down_EDF", "b_up_EU", "b_down_ED"}
    assert {name for name, _ in Experts(_bank()).named_parameters()} == {"w_up_EUD", "w_down_EDF"}
    assert f"experts={E}, model_width={D}, expert_width={F}, silu, gated={gated}" in repr(experts)


@pytest.mark.parametrize("name", list(dispatcher_classes()))
def test_dispatchers_are_found_by_their_name(name: str) -> None:
    cls = dispatcher_classes()[name]
    assert cls.name == name and issubclass(cls, Dispatcher)


@pytest.mark.parametrize("biased", [False, True])
def test_local_dispatch_is_the_sum_over_slots(biased: bool) -> None:
    mask_TK = torch.tensor([[True, False], [True, True], [True, True], [False, False], [True, True]])
    routing, x_TD = _routing(mask_TK), _tokens()
    # What a router leaves in an unused slot must not matter, NaN included.
    routing.weights_TK[~mask_TK] = float("nan")
    routing.expert_ids_TK[~mask_TK] = 77
    dispatcher, experts = LocalDispatcher(), Experts(_bank(biased=biased))
    sent = dispatcher.dispatch(x_TD, routing)
    assert sent.rows_ND is x_TD
    found_TD = dispatcher.combine(experts(sent), sent)
    expected_TD = torch.zeros_like(x_TD)
    for t, k in mask_TK.nonzero().tolist():
        e = int(routing.expert_ids_TK[t, k])
        gate, up = (x_TD[t] @ experts.w_up_EUD[e].t()).chunk(2)
        if experts.b_up_EU is not None:
            gate, up = gate + experts.b_up_EU[e][:F], up + experts.b_up_EU[e][F:]
        y = (gate * gate.sigmoid() * up) @ experts.w_down_EDF[e].t()
        if experts.b_down_ED is not None:
            y = y + experts.b_down_ED[e]
        expected_TD[t] += routing.weights_TK[t, k] * y.detach()
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-5, atol=1e-5)
    assert found_TD[3].tolist() == [0.0] * D


def test_unused_slots_get_no_gradient() -> None:
    mask_TK = torch.tensor([[True, False], [True, True], [True, True], [False, False], [True, True]])
    routing = _routing(mask_TK)
    routing.weights_TK.requires_grad_()
    sent = LocalDispatcher().dispatch(_tokens(), routing)
    Experts(_bank())(sent).sum().backward()
    grad_TK = routing.weights_TK.grad
    assert grad_TK is not None and ((grad_TK != 0) == mask_TK).all()
