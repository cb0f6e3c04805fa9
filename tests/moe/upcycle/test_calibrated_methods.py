"""What methods make of statistics: neurons, factors and router rows, worked by hand.

Letters: D model width, E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs import RouterConfig
from moe.routers.configs.analytical_config import AnalyticalConfig
from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.configs.unit_linear_config import UnitLinearConfig
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.cmoe import marks_of
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.cmoe_config import CMoEConfig
from moe.upcycle.configs.llama_moe_config import LlamaMoEConfig
from moe.upcycle.configs.llama_moe_v2_config import LlamaMoEV2Config
from moe.upcycle.configs.moefication_config import MoEficationConfig
from moe.upcycle.configs.snake_config import SnakeConfig
from moe.upcycle.equivalence import layer_drift
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan, NeuronRows
from moe.upcycle.llama_moe import share_and_divide
from recipes.models.hf.ffn_blocks import dense_ffn
from tests.moe.dispatch.gathered import gathered
from tests.moe.routers.routing_cases import build, make_ffn, make_layer, make_method

DIVIDING: list[tuple[UpcycleConfig, RouterConfig]] = [
    *(
        (LlamaMoEConfig(num_experts=6, split=split), TopKConfig())  # type: ignore[arg-type]
        for split in ("random", "cluster", "coactivation", "gradient", "sharing_inter")
    ),
    (LlamaMoEConfig(num_experts=6, split="sharing_inter", num_shared=2), TopKConfig()),
    (LlamaMoEV2Config(num_experts=5), TopKConfig()),
    (LlamaMoEV2Config(num_experts=6, residual=False), TopKConfig()),
    (CMoEConfig(num_experts=4, num_shared=2), AnalyticalConfig()),
    (CMoEConfig(num_experts=6, num_shared=0), AnalyticalConfig()),
    (SnakeConfig(num_experts=4, num_shared=2), OnePlusConfig()),
    (SnakeConfig(num_experts=6, importance="gradient"), OnePlusConfig()),
    (MoEficationConfig(num_experts=6), UnitLinearConfig()),
    (MoEficationConfig(num_experts=6, split="cluster"), UnitLinearConfig()),
]
# Divisible by 6, by 7 and by 8.
WIDTH = 168


def plan_of(
    config: UpcycleConfig, statistics: dict[str, Tensor], width: int, router: RouterConfig | None = None
) -> LayerPlan:
    """Of a network of one input."""
    shape = ffn_shape(make_ffn(D=1, F=width))
    return make_method(config, router).plan(shape, Draws(0, 0), statistics)


def neurons(plan: ExpertPlan | None) -> list[int]:
    """Of an expert, as it has them."""
    assert plan is not None and isinstance(plan.neurons_F, Tensor)
    return plan.neurons_F.tolist()


@pytest.mark.parametrize(("config", "router"), DIVIDING, ids=str)
def test_each_dense_neuron_is_used_once(config: UpcycleConfig, router: RouterConfig) -> None:
    ffn = make_ffn(F=WIDTH)
    method = make_method(config, router)
    plan = method.plan(ffn_shape(ffn), Draws(0, 0), gathered(method, ffn))
    every = [i for expert in plan.experts for i in neurons(expert)]
    every += neurons(plan.shared) if plan.shared is not None else []
    assert sorted(every) == list(range(WIDTH))
    assert all(neurons(expert) == sorted(neurons(expert)) for expert in plan.experts)


@pytest.mark.parametrize(("config", "router"), DIVIDING, ids=str)
def test_all_experts_at_weight_one_are_the_dense_network(config: UpcycleConfig, router: RouterConfig) -> None:
    if isinstance(router, TopKConfig):
        pytest.skip("its weights are shares")
    ffn = make_ffn(F=WIDTH, biased=True)
    everyone = type(router)(top_k=config.num_experts)  # type: ignore[call-arg]
    layer = make_layer(everyone, config, ffn).eval()
    x_TD = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert make_method(config, everyone).is_exact(layer.router)
    assert layer_drift(0, dense_ffn(x_TD, ffn), layer(x_TD).detach()).max_relative < 1e-12
    # Not once the router has learned something.
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.add_(0.1)
    assert not make_method(config, everyone).is_exact(layer.router)


def test_llama_moe_scales_the_down_projection() -> None:
    # Four of sixteen: each weighs 16/4 times a share of 1/4.
    plan = plan_of(LlamaMoEConfig(num_experts=16), {}, 32, TopKConfig(top_k=4))
    assert all(expert.scale == {"down": 4.0} and expert.width == 2 for expert in plan.experts)
    # The dense bias counts once, as the weights sum to 1.
    assert all(expert.down_bias == 1.0 for expert in plan.experts) and plan.shared is None
    own = plan_of(LlamaMoEConfig(num_experts=16, scale_factor=3.0), {}, 32)
    assert own.experts[0].scale == {"down": 3.0}


def test_llama_moe_by_importance() -> None:
    score = torch.tensor([[9.0, 8.0, 7.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    found = {"importance_EF": score}
    plan = plan_of(LlamaMoEConfig(num_experts=2, split="gradient"), found, 4)
    assert [neurons(expert) for expert in plan.experts] == [[0, 1], [2, 3]]
    # Each its own favourites: neuron 1 twice, neurons 0 and 3 once and never.
    plan = plan_of(LlamaMoEConfig(num_experts=2, split="sharing_inner"), found, 4)
    assert [neurons(expert) for expert in plan.experts] == [[0, 1], [1, 2]]


def test_what_most_experts_want_is_shared() -> None:
    # Parts of 2 of 6 neurons. Lists: {0, 1} and {1, 2}: neuron 1 is on both. Without it {0, 2} and {2, 4}:
    # neuron 2 is.
    score = torch.tensor([[5.0, 6.0, 0.5, 0.0, 0.0, 0.0], [0.0, 6.0, 4.0, 0.0, 2.0, 0.0]])
    groups, shared = share_and_divide(score, 1)
    assert shared.tolist() == [1, 2]
    # Of neurons 0, 3, 4, 5: 5 to expert 0 (neuron 0), 2 to expert 1 (neuron 4); the rest in order.
    assert groups.tolist() == [[0, 3], [4, 5]]
    plan = plan_of(
        LlamaMoEConfig(num_experts=2, split="sharing_inter"), {"importance_EF": score}, 6, TopKConfig()
    )
    assert neurons(plan.shared) == [1, 2] and plan.shared is not None
    # The shared expert has the dense bias, and no factor.
    assert plan.shared.scale == {} and plan.shared.down_bias == 1.0
    assert all(expert.down_bias == 0.0 and expert.scale == {"down": 1.0} for expert in plan.experts)


def test_v2_begins_its_router_at_the_centroids() -> None:
    score = torch.tensor([[5.0, 6.0, 0.5, 0.0, 0.0, 0.0], [0.0, 6.0, 4.0, 0.0, 2.0, 0.0]])
    centroids = torch.tensor([[3.0], [1.0]])
    found = {"importance_EF": score, "centroids_ED": centroids}
    plan = plan_of(LlamaMoEV2Config(num_experts=2), found, 6)
    assert neurons(plan.shared) == [1, 2] and [neurons(e) for e in plan.experts] == [[0, 3], [4, 5]]
    # Divided by the mean of 9 and 1.
    assert torch.equal(plan.router.rows_ED, centroids / 5)  # type: ignore[arg-type]
    # Two experts of a share of a half each: the factor makes them 1.
    assert plan.experts[0].scale == {"down": 2.0}
    raw = plan_of(LlamaMoEV2Config(num_experts=2, router_rows="raw_centroids"), found, 6)
    assert torch.equal(raw.router.rows_ED, centroids)  # type: ignore[arg-type]
    drawn = plan_of(LlamaMoEV2Config(num_experts=2, router_rows="drawn"), found, 6)
    assert drawn.router.rows_ED is None


def test_v2_without_a_shared_expert_is_runs() -> None:
    config = LlamaMoEV2Config(num_experts=8, residual=False)
    plan = plan_of(config, {}, 16)
    assert [neurons(expert) for expert in plan.experts][:2] == [[0, 1], [2, 3]]
    assert plan.experts[0].scale == {"down": 4.0} and plan.shared is None
    assert make_method(config).statistics == ()


def test_cmoe_carves_by_hand() -> None:
    # Parts of two of six neurons: 4 and 5 are most active. Of the rest, tokens 0 and 1 mark neurons 0 and 2,
    # tokens 2 and 3 neurons 1 and 3; neuron 0 stands for the first group and neuron 1 for the second.
    rate = torch.tensor([0.4, 0.35, 0.3, 0.2, 0.9, 0.8])
    markers = torch.tensor([[0, 2, 4], [0, 2, 5], [1, 3, 4], [1, 3, 5]], dtype=torch.int32)
    found = {"activation_rate_F": rate, "markers_TK": markers}
    plan = plan_of(CMoEConfig(num_experts=2, num_shared=1), found, 6, AnalyticalConfig(top_k=1))
    assert neurons(plan.shared) == [4, 5]
    assert [neurons(expert) for expert in plan.experts] == [[0, 2], [1, 3]]
    rows = plan.router.tensors
    assert isinstance(rows["gate_ED"], NeuronRows) and rows["gate_ED"].matrix == "gate"
    assert isinstance(rows["up_ED"], NeuronRows) and rows["up_ED"].neurons_EN.tolist() == [[0], [1]]
    assert marks_of(markers, 6)[0].tolist() == [1, 0, 1, 0, 1, 0]


def test_cmoe_begins_its_router_at_neurons() -> None:
    ffn = make_ffn(F=WIDTH)
    config = CMoEConfig(num_experts=4, num_shared=2)
    built = build(config, ffn, AnalyticalConfig())
    layer = make_layer(AnalyticalConfig(), config, ffn)
    assert ffn.gate_FD is not None
    for name, rows_FD in (("gate_ED", ffn.gate_FD), ("up_ED", ffn.up_FD)):
        tensor = built.router.tensors[name]
        assert isinstance(tensor, Tensor)
        torch.testing.assert_close(tensor.norm(dim=1), torch.ones(4, dtype=torch.float64))
        # Each is the row of one dense neuron that its expert has.
        likeness_EF = tensor @ torch.nn.functional.normalize(rows_FD, dim=1).t()
        best = likeness_EF.argmax(1)
        torch.testing.assert_close(likeness_EF.amax(1), torch.ones(4, dtype=torch.float64))
        plan = make_method(config, AnalyticalConfig()).plan(
            ffn_shape(ffn), Draws(1, 0), gathered(make_method(config), ffn)
        )
        assert all(int(neuron) in neurons(e) for neuron, e in zip(best, plan.experts, strict=True))
        torch.testing.assert_close(layer.router.get_parameter(name).double(), tensor, rtol=1e-6, atol=1e-7)


def test_the_analytical_score_is_a_neurons_activation() -> None:
    ffn = make_ffn(F=8)
    layer = make_layer(AnalyticalConfig(top_k=2), CMoEConfig(num_experts=8, num_shared=0), ffn).eval()
    x_TD = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = layer.router(x_TD, layer.context)
    assert ffn.gate_FD is not None
    # An expert is a neuron: those chosen are those with the largest activation of rows of length 1.
    unit_gate, unit_up = (torch.nn.functional.normalize(w, dim=1) for w in (ffn.gate_FD, ffn.up_FD))
    hidden_TF = (torch.nn.functional.silu(x_TD @ unit_gate.t()) * (x_TD @ unit_up.t())).abs()
    order = torch.cat([expert.neurons_F for expert in _experts(ffn)])  # type: ignore[list-item]
    expected = hidden_TF[:, order].topk(2, dim=1).indices
    assert torch.equal(routing.expert_ids_TK.sort(1).values, expected.sort(1).values)
    assert torch.equal(routing.weights_TK, torch.ones_like(routing.weights_TK))


def _experts(ffn: Any) -> tuple[ExpertPlan, ...]:
    method = make_method(CMoEConfig(num_experts=8, num_shared=0), AnalyticalConfig(top_k=2))
    return method.plan(ffn_shape(ffn), Draws(1, 0), gathered(method, ffn)).experts


def test_snake_by_hand() -> None:
    # Shared: neurons 7 and 6. The others fall from 5 to 0: rows (5 4), (2 3), (1 0) of two experts.
    found = {"output_importance_F": torch.arange(8.0)}
    plan = plan_of(SnakeConfig(num_experts=3, num_shared=1), found, 8, OnePlusConfig())
    assert neurons(plan.shared) == [6, 7]
    # Rows of three: (5 4 3), then (2 1 0) reversed.
    assert [neurons(expert) for expert in plan.experts] == [[0, 5], [1, 4], [2, 3]]
    assert all(expert.scale == {"down": 1.0} for expert in plan.experts)


def test_moefication_begins_its_router_at_mean_rows() -> None:
    ffn = make_ffn(gated=False, activation="relu", F=12)
    config = MoEficationConfig(num_experts=3, split="cluster")
    built = build(config, ffn, UnitLinearConfig())
    rows = torch.nn.functional.normalize(ffn.up_FD, dim=1)
    expected = []
    for e in range(3):
        mine = [rows[i] for i in range(12) if (built.bank.w_up_EUD[e] == ffn.up_FD[i]).all(1).any()]
        expected.append(torch.stack(mine).mean(0))
    assert isinstance(built.router.rows_ED, Tensor)
    torch.testing.assert_close(built.router.rows_ED, torch.stack(expected))


@pytest.mark.parametrize(
    ("config", "router", "options"),
    [
        (LlamaMoEConfig(num_experts=8, split="sharing_inter"), TopKConfig(), ["upcycle.num_experts"]),
        (LlamaMoEConfig(num_experts=16), TopKConfig(), []),
        (LlamaMoEV2Config(num_experts=8), AnalyticalConfig(), ["upcycle.num_experts", "upcycle.router_rows"]),
        (LlamaMoEV2Config(num_experts=7), UnitLinearConfig(), []),
        (CMoEConfig(num_experts=14), TopKConfig(), ["router.name"]),
        (CMoEConfig(num_experts=14, num_shared=1), AnalyticalConfig(), ["upcycle.num_experts"]),
        (SnakeConfig(), TopKConfig(), ["router.name"]),
        (SnakeConfig(num_shared=1), OnePlusConfig(), ["upcycle.num_experts"]),
        (MoEficationConfig(), UnitLinearConfig(), ["upcycle.name"]),
        (MoEficationConfig(), AnalyticalConfig(), ["upcycle.name", "router.name"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(config: UpcycleConfig, router: RouterConfig, options: list[str]) -> None:
    shape = ffn_shape(make_ffn(F=16))
    method = make_method(config, router)
    assert [found.path for found in method.check(router, shape)] == options
    # Without a shape, only what the router lacks.
    known = [option for option in options if option.startswith("router") or option.endswith("rows")]
    assert [found.path for found in method.check(router, None)] == known


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlamaMoEConfig(scale_factor=0.0), "scale_factor=0.0: experts that count nothing"),
        (lambda: LlamaMoEConfig(num_shared=0), "num_shared=0: sharing_inter shares at least one"),
        (lambda: LlamaMoEConfig(cluster_tokens=3), "cluster_tokens=3: every cluster needs a token"),
        (lambda: LlamaMoEV2Config(cluster_tokens=3), "cluster_tokens=3: every cluster needs a token"),
        (lambda: CMoEConfig(activation_top_k=0), "activation_top_k=0: must be at least 1. Raise it"),
        (lambda: SnakeConfig(num_shared=-1), "num_shared=-1: must be at least 0. Raise it"),
    ],
)
def test_refused_configs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
