"""COMET: trees worked by hand, a reference that walks every tree for every token, and how cost falls.

Letters: T tokens, D model width, E experts, K slots a token, J trees.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.plan.row_plan import make_plan
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers.comet import CometRouter
from moe.routers.configs.comet_config import CometConfig
from moe.routing.balance import figure_mean, loss_mean
from moe.types import Routing
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_bank, make_context, make_router

LN3 = math.log(3)


def _by_hand(nodes: list[list[float]], leaves: list[list[float]], **fields: Any) -> CometRouter:
    """A router whose nodes and leaves are constants: ``nodes[n][j]`` and ``leaves[e][j]``."""
    router = CometRouter(CometConfig(top_k=len(leaves[0]), **fields), 1, len(leaves)).double()
    with torch.no_grad():
        router.node_weight_NJD.zero_()
        router.leaf_weight_EJD.zero_()
        router.node_bias_NJ.copy_(torch.tensor(nodes))
        router.leaf_bias_EJ.copy_(torch.tensor(leaves))
    return router


def _weights(routing: Routing) -> dict[int, float]:
    used_K = routing.slot_mask_TK[0]
    return dict(
        zip(routing.expert_ids_TK[0][used_K].tolist(), routing.weights_TK[0][used_K].tolist(), strict=True)
    )


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_a_tree_of_three_worked_by_hand() -> None:
    # Node 0 has the children 1, a node, and 2, a leaf; node 1 the leaves 3 and 4. From the left: 3, 4, 2.
    # gamma 2: z0 = S(0.5) = 27/32, z1 = S(0) = 1/2. p = (27/64, 27/64, 10/64).
    # Leaf logits ln 1, ln 2, ln 3: weights as 27 : 54 : 30 of 111.
    router = _by_hand([[0.5], [0.0]], [[0.0], [math.log(2)], [LN3]], gamma=2.0, entropy_coef=0.5)
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 27 / 111, 1: 54 / 111, 2: 30 / 111}, rel=1e-7)
    # Entropy of p: 2 * 27/64 ln(64/27) + 10/64 ln(64/10) = 0.728195 + 0.290047
    assert routing.losses["entropy"].item() == pytest.approx(0.5 * 1.018242, rel=1e-6)
    assert routing.metrics["hard_nodes"] == 0 and routing.metrics["active_experts"] == 3


def test_two_hard_trees_worked_by_hand() -> None:
    # Tree 0 stands on expert 0 with logit ln 3, tree 1 on expert 1 with 0: 3/4 and 1/4. The other leaves'
    # logits are large and do not count. Nothing is left of the entropy.
    routing = _by_hand([[9.0, -9.0]], [[LN3, 50.0], [60.0, 0.0]])(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 3 / 4, 1: 1 / 4}, rel=1e-7)
    assert routing.losses["entropy"] == 0 and routing.metrics["hard_nodes"] == 1
    # Both on expert 0: one expert with weight 1, and one slot.
    routing = _by_hand([[9.0, 9.0]], [[LN3, 0.0], [60.0, 50.0]])(ONE, make_context())
    assert routing.expert_ids_TK.tolist() == [[0]] and routing.weights_TK.tolist() == [[1.0]]


def test_half_hard_trees_skip_whole_subtrees() -> None:
    # E = 4, one tree: node 0 half, node 1 hard left: expert 1 is out; node 2 hard right: expert 2 is out.
    routing = _by_hand([[0.0], [9.0], [-9.0]], [[0.0], [70.0], [70.0], [LN3]])(ONE, make_context())
    assert _weights(routing) == pytest.approx({0: 1 / 4, 3: 3 / 4}, rel=1e-7)
    assert routing.metrics["hard_nodes"].item() == pytest.approx(2 / 3)


def _slow(router: CometRouter, x_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and entropy of one token by walking each tree from its root, in the words of the paper."""
    E, gamma = router.num_experts, router.config.gamma

    def step(t: Tensor) -> Tensor:
        if t <= -gamma / 2:
            return t * 0
        if t >= gamma / 2:
            return t * 0 + 1
        return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5

    def walk(node: int, tree: int, p: Tensor) -> list[Tensor]:
        if node >= E - 1:
            return [p]
        z = step(router.node_weight_NJD[node, tree] @ x_D + router.node_bias_NJ[node, tree])
        return walk(2 * node + 1, tree, p * z) + walk(2 * node + 2, tree, p * (1 - z))

    shares, entropy = {}, x_D.new_zeros(())
    for tree in range(router.config.top_k):
        for expert, p in enumerate(walk(0, tree, x_D.new_ones(()))):
            if p > 0:
                logit = router.leaf_weight_EJD[expert, tree] @ x_D + router.leaf_bias_EJ[expert, tree]
                shares[expert, tree] = p * logit.exp()
                entropy = entropy - p * p.log()
    total = torch.stack(list(shares.values())).sum()
    gates = [
        torch.stack([x_D.new_zeros(()), *(s for (e, _), s in shares.items() if e == i)]) for i in range(E)
    ]
    return torch.stack([gate.sum() for gate in gates]) / total, entropy


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16])
@pytest.mark.parametrize("gamma", [0.3, 3.0, 30.0])
def test_every_token_walked_by_itself(num_experts: int, gamma: float) -> None:
    T, D = 7, 5
    config = CometConfig(top_k=min(num_experts, 3), gamma=gamma, entropy_coef=1.0)
    router = CometRouter(config, D, num_experts).double()
    g = torch.Generator().manual_seed(num_experts)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    x_TD = torch.randn(T, D, generator=g, dtype=torch.float64).requires_grad_()
    upstream_TE = torch.randn(T, num_experts, generator=g, dtype=torch.float64)
    routing = router(x_TD, make_context())
    slow = [_slow(router, x_D) for x_D in x_TD]
    slow_TE, slow_entropy = torch.stack([gates for gates, _ in slow]), sum(h for _, h in slow) / T
    found_TE = torch.zeros(T, num_experts, dtype=torch.float64)
    found_TE = found_TE.scatter_add(1, routing.expert_ids_TK, routing.weights_TK)
    # Near its edge the cubic as it stands in the papers cancels: 1e-16 absolute, 1e-7 of a z of 1e-9.
    torch.testing.assert_close(found_TE, slow_TE, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(routing.losses["entropy"], slow_entropy, rtol=1e-11, atol=1e-14)
    assert torch.equal(found_TE > 0, slow_TE > 0), "another set of experts is skipped"
    leaves = [x_TD, *router.parameters()]
    results = []
    for gates_TE, entropy in ((found_TE, routing.losses["entropy"]), (slow_TE, slow_entropy)):
        total = (gates_TE * upstream_TE).sum() + 0.3 * entropy
        results.append(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True))
    for name, found, expected in zip(["x", *dict(router.named_parameters())], *results, strict=True):
        expected = torch.zeros_like(leaves[0]) if expected is None and name == "x" else expected
        if found is None or expected is None:
            assert (found is None or not found.any()) and (expected is None or not expected.any()), name
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_hard_nodes_get_no_gradient_and_soft_ones_do() -> None:
    # Node 0 is hard, node 1, on its left, is soft; node 2 is soft and out of reach.
    router = _by_hand([[9.0], [0.1], [0.1]], [[0.3], [0.2], [0.1], [0.4]], entropy_coef=1.0)
    routing = router(ONE, make_context())
    (routing.weights_TK[0, 0] * 3 + routing.losses["entropy"]).backward()
    node_N, leaf_E = router.node_bias_NJ.grad[:, 0], router.leaf_bias_EJ.grad[:, 0]
    assert node_N[0] == 0 and node_N[1] != 0 and node_N[2] == 0
    assert leaf_E[:2].all() and not leaf_E[2:].any()


def _scaled_nodes(scale: float, num_experts: int) -> CometRouter:
    """The contract's router, with its nodes made harder (or all soft, by 0)."""
    router = make_router(CometConfig(), 6, num_experts).eval()
    with torch.no_grad():
        router.node_weight_NJD.mul_(scale)
        router.node_bias_NJ.mul_(scale)
    return router


def test_experts_out_of_reach_are_not_computed() -> None:
    # Every node is hard, so that two trees use at most two of 16 experts.
    router = _scaled_nodes(1e6, 16)
    x_TD = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    routing = router(x_TD, make_context())
    assert routing.expert_ids_TK.shape[1] <= 2
    plan = make_plan(routing.expert_ids_TK, 16, routing.slot_mask_TK)
    assert plan.num_rows == int(routing.slot_mask_TK.sum()) <= 2 * 50
    soft = _scaled_nodes(0.0, 16)(x_TD, make_context())
    assert soft.expert_ids_TK.shape == (50, 16) and soft.slot_mask_TK.all()


def test_copies_agree_while_the_trees_are_soft_half_hard_and_hard() -> None:
    x_TD = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bank = make_bank(E=1)
    outs = []
    for scale in (1e6, 1.0, 0.0):
        router = _scaled_nodes(scale, 5)
        weights = (matrix.expand(5, -1, -1).clone() for matrix in (bank.w_up_EUD, bank.w_down_EDF))
        copies = ExpertBank(*weights, "silu", True)
        outs.append(MoELayer(router, LocalDispatcher(), Experts(copies), make_context()).double()(x_TD))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-12, atol=1e-12)


def _train(x_TD: Tensor, region_T: Tensor, config: CometConfig) -> list[tuple[float, float, float]]:
    """Trains 16 experts on a linear map for each region; active experts, hard nodes and loss as it goes."""
    torch.manual_seed(0)
    router = CometRouter(config, 8, 16)
    router.reset_parameters(torch.Generator().manual_seed(0))
    layer = MoELayer(router, LocalDispatcher(), Experts(make_bank(8, 16, 16)), make_context())
    maps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    target_TD = torch.einsum("td,tdf->tf", x_TD, maps[region_T])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    history = []
    for step in range(301):
        loss = (layer(x_TD) - target_TD).square().mean()
        if step % 50 == 0:
            figures = router(x_TD, layer.context).metrics
            history.append((float(figures["active_experts"]), float(figures["hard_nodes"]), loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def test_active_experts_fall_towards_the_number_of_trees(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the figures of docs/routers/trees.md."""
    g = torch.Generator().manual_seed(1)
    normal_TD = torch.randn(256, 8, generator=g)
    quadrant_T = (normal_TD[:, 0] > 0) * 2 + (normal_TD[:, 1] > 0)
    cluster_T = torch.arange(256) % 4
    clustered_TD = torch.randn(4, 8, generator=g)[cluster_T] + 0.1 * normal_TD
    runs = {}
    for name, x_TD, region_T in (
        ("normal", normal_TD, quadrant_T),
        ("clusters", clustered_TD, cluster_T),
    ):
        for coefficient in (0.0, 5.0):
            runs[name, coefficient] = _train(x_TD, region_T, CometConfig(gamma=0.1, entropy_coef=coefficient))
    with capsys.disabled():
        print("\nCOMET, 16 experts, 2 trees, gamma 0.1: active experts / hard nodes / loss")
        for (name, coefficient), history in runs.items():
            print(f"{name}, entropy_coef {coefficient}")
            for step, (active, hard, loss) in zip(range(0, 301, 50), history, strict=True):
                print(f"  step {step:3}  {active:5.2f}  {hard:4.2f}  {loss:7.3f}")
    assert all(history[0][0] == 16 for history in runs.values())
    # Tokens in clusters leave the band of every node they meet; of a density some always stand in one.
    assert runs["clusters", 5.0][-1][0] <= 2
    assert runs["normal", 5.0][-1][0] < 4
    assert runs["normal", 0.0][-1][0] > 2 * runs["normal", 5.0][-1][0]


def _uneven_mean(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Gradient of the mean of squares of 5 numbers: 2 on rank 0, 3 on rank 1, padding on both."""
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    parts = [[1.0, 2.0], [3.0, 4.0, 5.0]][rank::ranks] if ranks > 1 else [[1.0, 2.0, 3.0, 4.0, 5.0]]
    values_T = torch.tensor([*parts[0], 50.0], dtype=torch.float64)
    mask = torch.tensor([[True] * len(parts[0]) + [False]])
    group = torch.distributed.group.WORLD if ranks > 1 else None
    ctx = make_context(padding_mask=mask, group=group)
    (grad,) = torch.autograd.grad(loss_mean((w * values_T).square(), ctx), w)
    return grad, figure_mean(values_T, ctx)


@pytest.mark.distributed
def test_means_over_ranks_with_unequal_tokens() -> None:
    # d/dw mean((w v)^2) = 2 w mean(v^2) = 4 * (1 + 4 + 9 + 16 + 25) / 5 = 44
    one, figure = _uneven_mean(0, 1)
    assert one.item() == 44 and figure.item() == 3
    two = run_ranks(_uneven_mean, 2)
    assert (two[0][0] + two[1][0]).item() / 2 == pytest.approx(44)
    assert [two[0][1].item(), two[1][1].item()] == [1.5, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0: a token needs at least one tree. Set it to 1 or more"),
        ({"gamma": 0.0}, "gamma=0.0: the band has a width. Set it above 0"),
        ({"entropy_coef": -1.0}, "entropy_coef=-1.0: a coefficient is not negative"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CometConfig(**fields)


def test_more_trees_than_experts_are_refused() -> None:
    assert "Set router.top_k to 4 or less" in str(CometConfig(top_k=5).check(4))


def test_initial_weights_reach_every_leaf() -> None:
    router = CometRouter(CometConfig(gamma=5.0), 40, 9)
    router.reset_parameters(torch.Generator().manual_seed(0))
    # 2 * 8 * 40 draws in +-0.05 and 2 * 9 * 40 in +-0.05: the largest comes near.
    assert 0.049 < router.node_weight_NJD.abs().max() <= 5.0 / 100
    assert 0.049 < router.leaf_weight_EJD.abs().max() <= 0.05
    assert router.node_bias_NJ.any() and router.leaf_bias_EJ.any()
