"""Permuted routers: by hand, through the whole search, as configs, and the contract while they search.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.routers.configs.comet_config import CometConfig
from moe.routers.configs.permuted_config import PermutedConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.permuted import PermutedRouter
from moe.routing.permutation_config import PermutationConfig
from moe.routing.slots import gates_of_slots, slots_of_gates
from moe.types import Routing
from tests.grid import Grid, each
from tests.moe.routers.routing_cases import label, make_context, make_layer

# The contract's parameters are 30 times the initial ones: at temperature 1 the permutation is soft.
SOFT = PermutationConfig(steps=5, log10_tau_start=0.0, log10_tau_end=-1.0)
SEARCHING = [
    PermutedConfig(inner=CometConfig(), search=SOFT),
    PermutedConfig(inner=TopKConfig(z_coef=0.1), search=SOFT),
    PermutedConfig(inner=TopKConfig(top_k=1, renormalise=False), search=SOFT),
]


def _contract() -> Iterator[Any]:
    """Every test of the contract for one router, with every value of its other parameters."""
    # Scores are trained in the steps of the search alone, which has a test of its own below.
    other = {"test_combine_weights_carry_a_gradient_to_every_parameter"}
    files = sorted(Path(__file__).parent.glob("test_moe_routers*.py"))
    modules = [importlib.import_module(f"tests.moe.routers.{file.stem}") for file in files]
    for name, test in (item for module in modules for item in vars(module).items()):
        grid: Grid | None = getattr(test, "grid", None)
        if not name.startswith("test_") or name in other or grid is None:
            continue
        axes = [axis for axis in grid.axes if axis.names != ["config"]]
        if len(axes) < len(grid.axes):
            for case, given in Grid(grid.test, axes).cases():
                yield pytest.param(grid.test, given, id=f"{name}-{case}")


@each("config", SEARCHING, ids=label)
@each(("test", "given"), list(_contract()))
def test_the_contract_holds_during_the_search(
    config: PermutedConfig, test: Any, given: dict[str, Any]
) -> None:
    test(config=config, **given)


def _router(search: PermutationConfig, **inner: Any) -> PermutedRouter:
    """Top-2 of 3 with constant logits ln 3, ln 1, ln 5: weights 3/8 of expert 0 and 5/8 of expert 2."""
    router = PermutedRouter(PermutedConfig(inner=TopKConfig(**inner), search=search), 1, 3).double()
    with torch.no_grad():
        router.inner.weight_ED.copy_(torch.tensor([[3.0], [1.0], [5.0]]).log())
    return router


ONE = torch.ones(1, 1, dtype=torch.float64)


def _weights(routing: Routing) -> list[float]:
    return gates_of_slots(routing)[0].tolist()


def test_without_a_search_nothing_changes() -> None:
    router = _router(PermutationConfig())
    assert router.search is None and {name for name, _ in router.named_parameters()} == {"inner.weight_ED"}
    assert _weights(router(ONE, make_context())) == pytest.approx([3 / 8, 0, 5 / 8], rel=1e-6)


def test_a_hard_permutation_worked_by_hand() -> None:
    # 0 -> 1, 1 -> 2, 2 -> 0: the 3/8 of expert 0 go to expert 1, the 5/8 of expert 2 to expert 0.
    router = _router(SOFT).eval()
    router.search.column_E.copy_(torch.tensor([1, 2, 0]))
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx([5 / 8, 3 / 8, 0], rel=1e-6)
    assert routing.expert_ids_TK.shape == (1, 2) and routing.slot_mask_TK is None
    # Scores were 3/9, 1/9, 5/9; logits ln 3, ln 1, ln 5.
    assert routing.scores_TE[0].tolist() == pytest.approx([5 / 9, 3 / 9, 1 / 9], rel=1e-6)
    assert routing.logits_TE[0].exp().tolist() == pytest.approx([5, 3, 1], rel=1e-6)


def test_a_soft_permutation_worked_by_hand() -> None:
    # Scores of 0 at any temperature: every entry of P is 1/3, and so is every weight.
    router = _router(SOFT, balance_coef=0.5)
    with torch.no_grad():
        router.search.scores_EE.zero_()
    routing = router(ONE, make_context())
    assert _weights(routing) == pytest.approx([1 / 3] * 3, rel=1e-6)
    assert routing.metrics["active_experts"] == 3
    assert routing.metrics["permutation_hardness"].item() == pytest.approx(1 / 3)
    # ln 3 for each of 3 columns and 3 rows, at the coefficient 1e-4; the inner loss is there as well.
    assert routing.losses["permutation"].item() == pytest.approx(6e-4 * 1.0986123, rel=1e-6)
    assert routing.losses["balance"].item() > 0
    # Two blocks, so that rows are (1, 0, 0) and twice (0, 1/2, 1/2): 3/8 and half of 5/8 each.
    with torch.no_grad():
        router.search.scores_EE.copy_(
            torch.tensor([[0.0, -99.0, -99.0], [-99.0, 0.0, 0.0], [-99.0, 0.0, 0.0]])
        )
    weights = _weights(router(ONE, make_context()))
    assert weights == pytest.approx([3 / 8, 5 / 16, 5 / 16], rel=1e-6)


def test_soft_weights_are_the_product_with_the_matrix() -> None:
    router = PermutedRouter(PermutedConfig(inner=CometConfig(), search=SOFT), 6, 5).double()
    with torch.no_grad():
        router.inner.node_weight_NJD.mul_(1e6)
    x_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner_TE = gates_of_slots(router.inner(x_TD, make_context()))
    assert (inner_TE == 0).any()
    found = router(x_TD, make_context(step=2))
    expected_TE = inner_TE @ router.search.soft(2).matrix_EE
    torch.testing.assert_close(gates_of_slots(found), expected_TE, rtol=1e-12, atol=1e-15)
    # The price of the search: every expert is used, however sparse the router in it is.
    assert found.expert_ids_TK.shape == (40, 5) and found.slot_mask_TK.all()


def test_scores_are_trained_during_the_search_and_at_rest_afterwards() -> None:
    router = _router(SOFT)
    for step, is_trained in ((0, True), (4, True), (5, False), (9, False)):
        routing = router(ONE, make_context(step=step))
        (routing.weights_TK[0, 0] * 3).backward()
        grad_EE = router.search.scores_EE.grad
        assert grad_EE is not None and bool(grad_EE.any()) is is_trained, step
        assert ("permutation" in routing.losses) is is_trained
        router.zero_grad()


def test_the_whole_search() -> None:
    layer = make_layer(PermutedConfig(inner=CometConfig(), search=SOFT))
    router, run = layer.router, layer.context.run
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x_TD = torch.randn(11, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    for _ in range(8):
        layer.train()
        state = router.search.column_E.clone()
        layer(x_TD).square().sum().backward()
        layer.eval()
        layer(x_TD)
        assert torch.equal(router.search.column_E, state), "forward changed the permutation"
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        router.after_optimizer_step(layer.context)
        seen.append((bool(router.search.is_frozen), router.search.column_E.tolist()))
    assert [frozen for frozen, _ in seen] == [False] * 4 + [True] * 4
    assert seen[4][1] == seen[-1][1], "a frozen permutation changed"
    # Another run starts at step 0; what is frozen stays so.
    other = make_layer(router.config)
    other.load_state_dict(layer.state_dict(), strict=True)
    routing = other.router.train()(x_TD, make_context(step=0))
    assert "permutation" not in routing.losses
    expected = router.eval()(x_TD, make_context(step=99))
    torch.testing.assert_close(gates_of_slots(routing), gates_of_slots(expected), rtol=0, atol=0)


def test_configs_survive_json_and_refuse_what_is_wrong() -> None:
    for config in SEARCHING:
        assert PermutedConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="name='nope': no router that can be permuted .* Choose one of"):
        PermutedConfig(inner={"name": "nope"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name='permuted': no router that can be permuted"):
        PermutedConfig(inner=PermutedConfig())
    for fields in ({"steps": -1}, {"entropy_coef": -1.0}, {"iterations_start": 0}, {"iterations_end": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            PermutationConfig(**fields)  # type: ignore[arg-type]


def test_it_has_what_the_router_in_it_has() -> None:
    router = PermutedRouter(PermutedConfig(inner=TopKConfig(top_k=3, renormalise=False)), 6, 4)
    assert router.top_k == 3 and not router.weights_sum_to_one
    assert PermutedRouter(PermutedConfig(inner=CometConfig(top_k=2)), 6, 4).weights_sum_to_one
    message = PermutedConfig(inner=TopKConfig(top_k=5)).check(4)
    own = TopKConfig(top_k=5).check(4)
    assert own is not None and message == own.under("inner")


def test_routers_with_dispatchers_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopKConfig, "mixes_tokens", True)
    assert "topk changes what the experts see" in str(PermutedConfig().check(4))


def test_slots_and_gates_worked_by_hand() -> None:
    gates_TE = torch.tensor([[0.0, 0.3, 0.0, 0.7], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ids_TK, weights_TK, used_TK = slots_of_gates(gates_TE)
    assert used_TK.tolist() == [[True, True], [True, False], [False, False]]
    assert ids_TK[0].tolist() == [3, 1] and ids_TK[1, 0] == 2
    assert weights_TK[0].tolist() == pytest.approx([0.7, 0.3]) and weights_TK[1].tolist() == [1, 0]
    assert torch.equal(gates_of_slots(Routing(ids_TK, weights_TK, 4, used_TK)), gates_TE)
    # Ids and weights of unused slots are not read.
    ids_TK, weights_TK = ids_TK.masked_fill(~used_TK, 99), weights_TK.masked_fill(~used_TK, float("nan"))
    assert torch.equal(gates_of_slots(Routing(ids_TK, weights_TK, 4, used_TK)), gates_TE)
