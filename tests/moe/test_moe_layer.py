"""The whole layer: equal to the dense network after upcycling, and its balance losses under accumulation and
activation checkpointing.

Letters: T tokens, D model width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.activations import ACTIVATIONS
from moe.experts.weights import FFNWeights
from moe.layer import MoELayer, moe_layers
from moe.metrics import report_load
from moe.routers.configs import RouterConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from tests.grid import each
from tests.kernels.expert_reference import FORMULAS, ON_VALUE
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, label, make_ffn, make_layer, make_router

SUM_TO_ONE = [config for config in ROUTER_CONFIGS if make_router(config).weights_sum_to_one]
every_config = each("config", ROUTER_CONFIGS, ids=label)


def _tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dense(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    """The network before upcycling, written out."""
    act = FORMULAS[ffn.activation]
    up = x_TD @ ffn.up_FD.t() + (0 if ffn.b_up_F is None else ffn.b_up_F)
    if ffn.gate_FD is None:
        hidden = act(up)
    else:
        value = act(up) if ffn.activation in ON_VALUE else up
        hidden = act(x_TD @ ffn.gate_FD.t() + (0 if ffn.b_gate_F is None else ffn.b_gate_F)) * value
    return hidden @ ffn.down_DF.t() + (0 if ffn.b_down_D is None else ffn.b_down_D)


@each("config", SUM_TO_ONE, ids=label)
@each("gated", [True, False])
@each("biased", [True, False])
def test_copies_compute_the_dense_network(config: RouterConfig, gated: bool, biased: bool) -> None:
    ffn = make_ffn(gated, biased)
    layer = make_layer(config, CopyConfig(num_experts=4), ffn).eval()
    x, dense_x = (_tokens(2, 7, 6).requires_grad_() for _ in range(2))
    out, dense = layer(x), _dense(ffn, dense_x)
    assert out.shape == x.shape and out.dtype == torch.float64
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-13)
    upstream = _tokens(2, 7, 6, seed=8)
    out.backward(upstream)
    dense.backward(upstream)
    # The router adds nothing: its weights sum to 1 whatever x is, and the experts agree.
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-11, atol=1e-12)


@each("activation", list(ACTIVATIONS))
def test_copies_compute_the_dense_network_with_any_activation(activation: str) -> None:
    ffn = make_ffn(activation=activation)
    x_TD = _tokens(9, 6)
    found = make_layer(TopKConfig(), ffn=ffn).eval()(x_TD)
    torch.testing.assert_close(found, _dense(ffn, x_TD), rtol=1e-12, atol=1e-13)


@each("config", SUM_TO_ONE, ids=label)
def test_gradients_of_the_copies_add_up_to_the_dense_gradient(config: RouterConfig) -> None:
    ffn = make_ffn(biased=True)
    parts = [ffn.gate_FD, ffn.up_FD, ffn.down_DF, ffn.b_gate_F, ffn.b_up_F, ffn.b_down_D]
    leaves = [part.clone().requires_grad_() for part in parts if part is not None]
    gate, up, down, b_gate, b_up, b_down = leaves
    dense = FFNWeights(up, down, ffn.activation, gate, b_gate, b_up, b_down)
    _dense(dense, _tokens(9, 6)).square().sum().backward()
    layer = make_layer(config, CopyConfig(num_experts=4), ffn).eval()
    layer(_tokens(9, 6)).square().sum().backward()
    expected = {
        "w_up_EUD": torch.cat([gate.grad, up.grad]),
        "w_down_EDF": down.grad,
        "b_up_EU": torch.cat([b_gate.grad, b_up.grad]),
        "b_down_ED": b_down.grad,
    }
    for name, value in expected.items():
        found = getattr(layer.experts, name).grad.sum(0)
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11, msg=name)


def _weighted_output(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """A main loss whose gradient at the output is not constant."""
    return layer(x_TD).square().sum()


def _auxiliary(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """The router's losses as a function, without the layer."""
    losses = layer.router(x_TD.reshape(-1, x_TD.shape[-1]), layer.context).losses
    return torch.stack([loss.double() for loss in losses.values()]).sum()


BALANCED = TopKConfig(balance_coef=0.7, z_coef=0.2)


@each("loss_scale", [1.0, 0.125])
def test_attached_losses_agree_with_finite_differences(loss_scale: float) -> None:
    layer = make_layer(BALANCED, loss_scale=loss_scale)
    x_TD = _tokens(11, 6)
    _weighted_output(layer, x_TD).mul(loss_scale).backward()
    weight = layer.router.weight_ED
    step = 1e-6
    numeric = torch.zeros_like(weight)
    with torch.no_grad():
        for index in range(weight.numel()):
            values = []
            for sign in (1, -1):
                weight.view(-1)[index] += sign * step
                values.append(loss_scale * (_weighted_output(layer, x_TD) + _auxiliary(layer, x_TD)))
                weight.view(-1)[index] -= sign * step
            numeric.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    assert weight.grad is not None
    # Central differences: error of step^2 and of 1e-16 / step.
    torch.testing.assert_close(weight.grad, numeric, rtol=1e-6, atol=1e-7)
    # The balance losses are a visible part of it.
    (auxiliary,) = torch.autograd.grad(_auxiliary(layer, x_TD), weight)
    assert (loss_scale * auxiliary).abs().max() > 1e-2 * loss_scale


def test_coefficients_mean_the_same_under_accumulation() -> None:
    layer = make_layer(BALANCED)
    parts = [_tokens(11, 6, seed=seed) for seed in range(4)]
    run = layer.context.run
    run.num_micro_batches, run.loss_scale = 4, 1 / 4
    for run.micro_batch, part in enumerate(parts):
        (_weighted_output(layer, part) * run.loss_scale).backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    # Without the attachment: the mean over micro-batches of main loss + balance losses, in one graph.
    bare = copy.deepcopy(layer)
    bare.zero_grad()
    plain = bare.eval()
    main = sum(_weighted_output(plain, part) for part in parts)
    plain.train()
    (sum((_auxiliary(plain, part) for part in parts), main) / 4).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-12, msg=name)


@every_config
@each("use_reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(
    config: RouterConfig, use_reentrant: bool
) -> None:
    plain = make_layer(config, loss_scale=0.5)
    recomputed = copy.deepcopy(plain)
    for micro_batch in range(2):
        x_TD = _tokens(11, 6, seed=micro_batch)
        grads = []
        for layer in (plain, recomputed):
            layer.context.run.micro_batch = micro_batch
            leaf = x_TD.clone().requires_grad_()
            call = layer if layer is plain else _Checkpointed(layer, use_reentrant)
            call(leaf).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1])
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name
    tokens = {m: sums[-4].item() for m, sums in recomputed.stats.sums.items()}
    assert tokens == {0: 11.0, 1: 11.0}
    assert report_load([(0, plain.stats)]) == report_load([(0, recomputed.stats)])


class _Checkpointed(nn.Module):
    def __init__(self, layer: MoELayer, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


@every_config
def test_evaluation_leaves_no_trace(config: RouterConfig) -> None:
    layer = make_layer(config)
    trained = layer(_tokens(11, 6)).detach()
    layer.stats.clear()
    layer.eval()
    out = layer(_tokens(11, 6))
    out.square().sum().backward()
    assert not layer.stats.sums and not layer.stats.losses
    # In evaluation no balance loss reaches the router: the same gradient as without coefficients.
    silent = make_layer(type(config)(**{**vars(config), **dict.fromkeys(_coefficients(config), 0.0)}))
    silent.load_state_dict(layer.state_dict())
    silent.eval()(_tokens(11, 6)).square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), silent.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=name)
    if config.name == "topk":
        torch.testing.assert_close(out, trained, rtol=0, atol=0)


def _coefficients(config: RouterConfig) -> list[str]:
    return [name for name in vars(config) if name.endswith("_coef")]


def test_padding_is_not_counted() -> None:
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    layer = make_layer(BALANCED, padding_mask=mask)
    layer(_tokens(2, 5, 6))
    sums = layer.stats.sums[0]
    # 7 real tokens, 14 slots, none dropped
    assert sums[-4:-1].tolist() == [7, 14, 0] and sums[:4].sum() == 14


def test_a_mask_of_another_batch_is_not_applied() -> None:
    layer = make_layer(BALANCED, padding_mask=torch.zeros(3, 3, dtype=torch.bool))
    layer(_tokens(2, 5, 6))
    assert layer.stats.sums[0][-4].item() == 10


@each("shape", [(0, 6), (1, 6), (1, 1, 6), (2, 0, 6), (2, 3, 4, 6)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = make_layer(BALANCED)
    x = _tokens(*shape).requires_grad_()
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_layers_are_found_by_name_in_order() -> None:
    first, second = make_layer(BALANCED), make_layer(BALANCED)
    model = nn.ModuleDict({"b": nn.Sequential(nn.Identity(), first), "a": second})
    assert [name for name, _ in moe_layers(model)] == ["b.1", "a"]
    assert [layer for _, layer in moe_layers(model)] == [first, second]
