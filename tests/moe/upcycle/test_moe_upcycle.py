"""The contract of every upcycling method that discovery finds, and copies in particular.

Letters: T tokens, D model width, E experts, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Generator, Tensor

from moe.experts.weights import ExpertBank, FFNWeights
from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle import upcycle_methods
from moe.upcycle.build_experts import BuiltLayer, ffn_shape
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.equivalence import TOLERANCES, layer_drift, logit_drift, require_exact
from tests.grid import each
from tests.kernels.expert_reference import FORMULAS
from tests.moe.routers.routing_cases import (
    METHOD_CONFIGS,
    ROUTER_CONFIGS,
    build,
    label,
    make_ffn,
    make_layer,
    make_method,
    make_router,
    router_case,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Claims depend on sums of weights, on ties, or on nothing: one method of each kind meets every config of
# every router, the other methods every router, and their variants what tells routers apart.
_DEFAULTS = [config for config in METHOD_CONFIGS if config == type(config)()]
_KINDS = ("copy", "virtual_group", "shared_dense")
_PAIRS = [
    (config, router)
    for config in _DEFAULTS
    for router in ROUTER_CONFIGS
    if config.name in _KINDS or router == type(router)()
]
_TELLING: list[RouterConfig] = [
    TopKConfig(),
    TopKConfig(top_k=4),
    TopKConfig(renormalise=False),
    TopKConfig(score="sigmoid", renormalise=False),
    DeepSeekV3Config(top_k=4, routed_scaling=2.5),
]
every_config = each("config", METHOD_CONFIGS, ids=label)
every_shape = each(("gated", "biased"), [(True, False), (False, False), (True, True), (False, True)])


def _network(gated: bool = True, biased: bool = False) -> FFNWeights:
    """Sixteen neurons, so that shards and parts come out even."""
    return make_ffn(gated, biased, F=16)


def _tensors(*owners: FFNWeights | ExpertBank | None) -> dict[str, Tensor]:
    return {
        f"{type(owner).__name__}.{field.name}": value
        for owner in owners
        if owner is not None
        for field in fields(owner)
        if isinstance(value := getattr(owner, field.name), Tensor)
    }


def _made(built: BuiltLayer) -> dict[str, Tensor]:
    return _tensors(built.bank, built.shared)


def _bank(config: UpcycleConfig, ffn: FFNWeights, seed: int = 0) -> ExpertBank:
    return build(config, ffn, seed=seed).bank


def _dense(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    up = x_TD @ ffn.up_FD.t() + (0 if ffn.b_up_F is None else ffn.b_up_F)
    act = FORMULAS[ffn.activation]
    if ffn.gate_FD is None:
        hidden = act(up)
    else:
        hidden = act(x_TD @ ffn.gate_FD.t() + (0 if ffn.b_gate_F is None else ffn.b_gate_F)) * up
    return hidden @ ffn.down_DF.t() + (0 if ffn.b_down_D is None else ffn.b_down_D)


@each("name", list(upcycle_methods()))
def test_name_class_and_config_belong_together(name: str) -> None:
    cls = upcycle_methods()[name]
    assert cls.name == name and cls.config_class(name=name).name == name
    assert issubclass(cls.config_class, UpcycleConfig)


@every_config
@every_shape
def test_bank_fits_the_layer(config: UpcycleConfig, gated: bool, biased: bool) -> None:
    ffn = _network(gated, biased)
    built = build(config, ffn)
    bank = built.bank
    E, U, D = bank.w_up_EUD.shape
    F = bank.w_down_EDF.shape[2]
    assert (config.num_experts, ffn.model_width) == (E, D) and bank.num_experts == E
    assert bank.w_down_EDF.shape == (E, D, F) and (2 * F if gated else F) == U
    assert (bank.gated, bank.activation) == (gated, ffn.activation)
    assert bank.b_up_EU is None if not biased else bank.b_up_EU.shape == (E, U)
    assert bank.b_down_ED is None if not biased else bank.b_down_ED.shape == (E, D)
    if built.shared is not None:
        shape = ffn_shape(built.shared)
        assert replace(shape, width=ffn.width) == ffn_shape(ffn)
    for name, value in _made(built).items():
        assert value.dtype == torch.float64 and value.is_contiguous() and not value.requires_grad, name
        assert value.isfinite().all(), name


def _hold_to_claim(config: UpcycleConfig, router: RouterConfig, ffn: FFNWeights) -> None:
    refused = router.check(config.num_experts)
    if refused or make_method(config, router).check(router, ffn_shape(ffn)):
        pytest.skip("they do not go together, and say so")
    layer = make_layer(router, config, ffn).eval()
    x_TD = torch.randn(17, 6, generator=Generator().manual_seed(2), dtype=torch.float64)
    dense_TD, moe_TD = _dense(ffn, x_TD), layer(x_TD).detach()
    drift = layer_drift(0, dense_TD, moe_TD)
    if make_method(config, router).is_exact(layer.router):
        assert drift.max_relative <= 1e-12
        require_exact(config.name, logit_drift(dense_TD, moe_TD), [drift], torch.float64)
    elif layer.router.top_k < config.num_experts and "inexactness" not in router_case(router.name).excused:
        # A method that is exact after all should say so (all experts of a softmax sum to 1 in any case).
        assert drift.max_relative > TOLERANCES[torch.float64]


@each(("config", "router"), _PAIRS, ids=label)
def test_a_claim_to_be_exact_holds_under_every_router(config: UpcycleConfig, router: RouterConfig) -> None:
    _hold_to_claim(config, router, _network(biased=True))


@every_config
@each("router", _TELLING, ids=label)
@each(("gated", "biased"), [(True, False), (False, True)])
def test_a_claim_to_be_exact_holds(
    config: UpcycleConfig, router: RouterConfig, gated: bool, biased: bool
) -> None:
    _hold_to_claim(config, router, _network(gated, biased))


@every_config
@every_shape
def test_experts_and_dense_network_share_no_memory(config: UpcycleConfig, gated: bool, biased: bool) -> None:
    ffn = _network(gated, biased)
    kept = {name: value.clone() for name, value in _tensors(ffn).items()}
    built = build(config, ffn)
    for name, value in _tensors(ffn).items():
        assert torch.equal(value, kept[name]), f"building changed {name}"
    for name, stacked_E in _tensors(built.bank).items():
        others = stacked_E[1:].clone()
        stacked_E[0].fill_(123.0)
        assert torch.equal(stacked_E[1:], others), f"{name}: experts share storage"
    for value in _made(built).values():
        value.fill_(123.0)
    for name, value in _tensors(ffn).items():
        assert torch.equal(value, kept[name]), f"{name} shares storage with the experts"
    pointers = [value.untyped_storage().data_ptr() for value in _made(built).values()]
    assert len(set(pointers)) == len(pointers), "two parameters share storage"


@every_config
def test_randomness_comes_from_the_draws_alone(config: UpcycleConfig) -> None:
    ffn = _network(biased=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _made(build(config, ffn, seed=5))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    second = _made(build(config, ffn, seed=5))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@every_config
@each("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(config: UpcycleConfig, dtype: torch.dtype) -> None:
    ffn = _network(biased=True)
    narrow = replace(
        ffn, **{name.partition(".")[2]: value.to(dtype) for name, value in _tensors(ffn).items()}
    )
    assert {value.dtype for value in _made(build(config, narrow)).values()} == {dtype}


@every_config
def test_trained_parameters_can_be_upcycled(config: UpcycleConfig) -> None:
    ffn = _network(biased=True)
    leaves = {name.partition(".")[2]: value.requires_grad_() for name, value in _tensors(ffn).items()}
    built = build(config, replace(ffn, **leaves))
    assert not any(value.requires_grad for value in _made(built).values())


def test_copies_worked_by_hand() -> None:
    # D = 1, F = 2: gate rows first, then up rows; biases alike.
    ffn = FFNWeights(
        up_FD=torch.tensor([[1.0], [2.0]]),
        gate_FD=torch.tensor([[3.0], [4.0]]),
        down_DF=torch.tensor([[5.0, 6.0]]),
        activation="gelu",
        b_gate_F=torch.tensor([7.0, 8.0]),
        b_up_F=torch.tensor([9.0, 10.0]),
        b_down_D=torch.tensor([11.0]),
    )
    bank = _bank(CopyConfig(num_experts=2), ffn)
    assert bank.w_up_EUD.tolist() == [[[3.0], [4.0], [1.0], [2.0]]] * 2
    assert bank.w_down_EDF.tolist() == [[[5.0, 6.0]]] * 2
    assert bank.b_up_EU is not None and bank.b_up_EU.tolist() == [[7.0, 8.0, 9.0, 10.0]] * 2
    assert bank.b_down_ED is not None and bank.b_down_ED.tolist() == [[11.0]] * 2
    assert (bank.activation, bank.gated) == ("gelu", True)


def test_noise_is_a_share_of_each_matrix_own_deviation() -> None:
    ffn = make_ffn(D=64, F=96)
    assert ffn.gate_FD is not None
    # Gate and up a hundredfold apart: stacked, they would share the larger one's deviation.
    ffn = replace(ffn, gate_FD=100 * ffn.gate_FD)
    bank = _bank(CopyConfig(num_experts=4, noise_std=0.2), ffn)
    pairs = {
        "gate": (bank.w_up_EUD[:, :96] - ffn.gate_FD, ffn.gate_FD),
        "up": (bank.w_up_EUD[:, 96:] - ffn.up_FD, ffn.up_FD),
        "down": (bank.w_down_EDF - ffn.down_DF, ffn.down_DF),
    }
    for name, (noise_E, dense) in pairs.items():
        # 24576 draws: the standard error of the deviation is 0.5%, of the mean 0.6% of a deviation.
        scale = 0.2 * float(dense.std())
        assert float(noise_E.std()) == pytest.approx(scale, rel=0.03), name
        assert abs(float(noise_E.mean())) < 0.03 * scale, name
        # Each expert has its own.
        flat = torch.corrcoef(noise_E.flatten(1))
        assert (flat - torch.eye(4)).abs().max() < 0.07, name


def test_noise_depends_on_the_seed_and_leaves_biases_alone() -> None:
    config, ffn = CopyConfig(num_experts=3, noise_std=0.1), make_ffn(biased=True)
    first, other = _bank(config, ffn, seed=1), _bank(config, ffn, seed=2)
    assert not torch.equal(first.w_up_EUD, other.w_up_EUD)
    assert not torch.equal(first.w_down_EDF, other.w_down_EDF)
    clean = _bank(CopyConfig(num_experts=3), ffn)
    for name in ("b_up_EU", "b_down_ED"):
        assert torch.equal(getattr(first, name), getattr(clean, name)), name


def test_copies_claim_exactness_under_the_right_conditions_alone() -> None:
    summing, other = make_router(TopKConfig()), make_router(TopKConfig(renormalise=False))
    assert make_method(CopyConfig()).is_exact(summing)
    assert not make_method(CopyConfig()).is_exact(other)
    assert not make_method(CopyConfig(noise_std=1e-9)).is_exact(summing)


@each(
    ("given", "message"),
    [
        ({"num_experts": 1}, "num_experts=1: a mixture has at least two experts. Set it to 2 or more"),
        ({"noise_std": -0.1}, "noise_std=-0.1: a deviation is not negative. Set it to 0 or more"),
        ({"layers": "some"}, "layers='some': is none of the known forms. Use all, every:N"),
        ({"layers": [1, 1]}, "names a layer twice"),
    ],
)
def test_refused_configs(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyConfig(**given)  # type: ignore[arg-type]


def test_weights_of_the_wrong_shape_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"down is \(3, 2\), expected \(2, 3\)"):
        FFNWeights(torch.zeros(3, 2), torch.zeros(3, 2), "silu")
    with pytest.raises(AssertionError, match=r"gate is \(2, 2\), expected \(3, 2\)"):
        FFNWeights(torch.zeros(3, 2), torch.zeros(2, 3), "silu", gate_FD=torch.zeros(2, 2))
    with pytest.raises(AssertionError, match="both or no biases"):
        FFNWeights(
            torch.zeros(3, 2), torch.zeros(2, 3), "silu", gate_FD=torch.zeros(3, 2), b_up_F=torch.zeros(3)
        )
