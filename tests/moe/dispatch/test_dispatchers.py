"""Every dispatcher brings tokens to their experts and back: on one rank as written out, on several as on one.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.dispatch import dispatcher_classes
from moe.dispatch.all_to_all import AllToAllDispatcher, _Trip, experts_of_a_rank
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.same_tokens import SameTokensDispatcher
from moe.errors import ConfigError
from moe.experts.expert_slices import keep_slice
from moe.routers.configs import RouterConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.types import Routing
from tests.distributed_helper import run_ranks
from tests.moe.dispatch.dispatch_cases import (
    CASES,
    MAKERS,
    DispatchCase,
    E,
    local,
    make_experts,
    make_shared,
    obvious,
    run,
)
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, label, make_layer

RANKS = 4
Found = dict[str, Tensor]


class Outcome(NamedTuple):
    """Of one rank.

    Attributes:
        spread: By case and number of ranks over which experts are spread.
        layers: By router, the largest difference that spread experts make.
        sent: Rows, counts and weights that have come here.
        order: What was done in turn.
        same: By case, where pairs of ranks hold the same tokens and experts are spread over all.
    """

    spread: dict[str, dict[int, Found]]
    layers: dict[str, float]
    sent: list[str]
    order: list[str]
    same: dict[str, Found]


# Routers that no expert parallelism can serve are told by name; all others are tried.
SPREADABLE = [config for config in ROUTER_CONFIGS if not config.reads_experts]


def assert_near(found: Found, wanted: Found, dtype: torch.dtype) -> None:
    """Equal but for rounding, in units of the largest entry.

    The longest sums have some 30 terms: 2^-53 times a hundred. In bf16 an entry is rounded as h, as the
    activation, as the result of an expert, and when ranks or slots are added up: four times 2^-8.
    """
    unit = 100 * 2.0**-53 if dtype == torch.float64 else 4 * 2.0**-8
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        if want.numel():
            error = float((found[name].double() - want.double()).abs().max())
            assert error <= unit * max(1.0, float(want.abs().max())), name


def test_every_dispatcher_is_tested() -> None:
    assert set(MAKERS) == set(dispatcher_classes())


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_one_rank_does_what_is_written_out(name: str, case: str) -> None:
    dtype, batch = CASES[case].dtype, CASES[case].batch(0)
    for gated in (True, False):
        experts = make_experts(gated, dtype)
        assert_near(run(MAKERS[name](E, None), experts, batch), obvious(experts, batch), dtype)


def _alone(case: str) -> list[Found]:
    """What each rank's batch gives by itself, with all experts at hand."""
    chosen = CASES[case]
    return [run(LocalDispatcher(), make_experts(True, chosen.dtype), chosen.batch(r)) for r in range(RANKS)]


def _groups(ranks: int) -> dict[int, DeviceMesh]:
    """Meshes of one axis: all ranks, pairs of neighbours, and each rank by itself."""
    square = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("outer", "inner"))
    single = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("outer", "inner"))
    return {ranks: init_device_mesh("cpu", (ranks,)), 2: square["inner"], 1: single["inner"]}


def _spread_out(rank: int, ranks: int) -> Outcome:
    groups = _groups(ranks)
    found: dict[str, dict[int, Found]] = {}
    for name, case in CASES.items():
        found[name] = {}
        for size, mesh in groups.items():
            experts = make_experts(True, case.dtype)
            keep_slice(experts, mesh)
            assert [len(local(p)) for p in experts.parameters()] == [E // size] * 4
            assert [len(p) for p in experts.parameters()] == [E] * 4
            found[name][size] = run(MAKERS["all_to_all"](E, mesh), experts, case.batch(rank))
    errors = {label(c): _layer_error(c, rank, groups[2]) for c in SPREADABLE}
    same = {name: _same_tokens(case, rank, groups[2], groups[ranks]) for name, case in CASES.items()}
    return Outcome(found, errors, _sent_rows(groups[2]), _order(groups[2]), same)


def _same_tokens(case: DispatchCase, rank: int, pair: DeviceMesh, ranks: DeviceMesh) -> Found:
    experts = make_experts(True, case.dtype)
    keep_slice(experts, ranks)
    inner = AllToAllDispatcher(E, ranks.get_group())
    return run(SameTokensDispatcher(inner, pair.get_group()), experts, case.batch(rank // 2))


def _layer_error(config: RouterConfig, rank: int, mesh: DeviceMesh) -> float:
    """The largest difference that spreading its experts makes to a layer, with another T on each rank."""
    x_BSD = torch.randn(2, 5 + rank, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    outcomes: list[list[Tensor]] = []
    for spread in (False, True):
        layer = make_layer(config)
        # Computed while the tokens travel.
        layer.shared = make_shared()
        g = torch.Generator().manual_seed(1)
        for parameter in layer.experts.parameters():
            # Experts that differ: otherwise it would not matter which token goes where.
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        if spread:
            keep_slice(layer.experts, mesh)
            layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, mesh.get_group()))
        torch.manual_seed(rank)
        x = x_BSD.clone().requires_grad_()
        out = layer(x)
        out.backward(x_BSD.flip(0))
        unspread = [*layer.router.parameters(), *layer.shared.parameters()]
        grads = [p.grad for p in unspread if p.grad is not None]
        assert x.grad is not None
        outcomes.append([out.detach(), x.grad, *grads])
    assert len(outcomes[0]) == len(outcomes[1])
    return max(float((a - b).abs().max()) for a, b in zip(*outcomes, strict=True))


def _order(mesh: DeviceMesh) -> list[str]:
    """What a layer with a shared expert does, in turn: trips that begin and end, and the shared expert."""
    layer = make_layer(TopKConfig())
    layer.shared = make_shared()
    keep_slice(layer.experts, mesh)
    layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, mesh.get_group()))
    done: list[str] = []
    layer.shared.register_forward_hook(lambda *_: done.append("shared"))
    layer.shared.w_up_UD.register_hook(lambda grad: done.append("shared"))
    begin, end = _Trip.begin, _Trip.end

    def begins(trip: _Trip, rows_ND: Tensor, *, back: bool = False) -> Tensor:
        done.append("begins")
        return begin(trip, rows_ND, back=back)

    def ends(trip: _Trip) -> Tensor:
        done.append("ends")
        return end(trip)

    with patch.object(_Trip, "begin", begins), patch.object(_Trip, "end", ends):
        out = layer(torch.ones(1, 4, 6, dtype=torch.float64, requires_grad=True))
        done.append("|")
        out.sum().backward()
    return done


def _sent_rows(mesh: DeviceMesh) -> list[str]:
    """Two experts on each of two ranks; tokens use (0, 1), (1, 2), (3, none), (none, none)."""
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, -1], [-1, 7]])
    mask_TK = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    x_TD = torch.arange(4.0)[:, None] + 10 * mesh.get_local_rank()
    routing = Routing(ids_TK, torch.ones(4, 2), 4, mask_TK)
    sent = AllToAllDispatcher(4, mesh.get_group()).dispatch(x_TD, routing)
    return [
        str(sent.rows_ND.flatten().tolist()),
        str(sent.plan.counts_E.tolist()),
        str(sent.weights_NK.tolist()),
    ]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """Of every rank; one start of the processes serves all cases."""
    return run_ranks(_spread_out, RANKS)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("size", [1, 2, RANKS])
def test_spread_experts_do_what_experts_on_every_rank_do(size: int, case: str, outcomes: Any) -> None:
    alone, dtype = _alone(case), CASES[case].dtype
    weights = [name for name in alone[0] if name not in ("out", "x", "weights")]
    for rank in range(RANKS):
        found = outcomes[rank].spread[case][size]
        wanted = {name: alone[rank][name] for name in ("out", "x", "weights")}
        # A rank's experts see the tokens of its whole group.
        group = range(rank // size * size, rank // size * size + size)
        mine = slice(rank % size * E // size, (rank % size + 1) * E // size)
        wanted |= {name: sum(alone[r][name].double() for r in group)[mine] for name in weights}  # type: ignore[index]
        assert_near(found, wanted, dtype)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_ranks_with_the_same_tokens_have_them_computed_once(case: str, outcomes: Any) -> None:
    alone, dtype = _alone(case), CASES[case].dtype
    weights = [name for name in alone[0] if name not in ("out", "x", "weights")]
    for rank in range(RANKS):
        wanted = {name: alone[rank // 2][name] for name in ("out", "x", "weights")}
        # Two different batches: twice as much would say that tokens have been there twice.
        mine = slice(rank * E // RANKS, (rank + 1) * E // RANKS)
        wanted |= {name: (alone[0][name].double() + alone[1][name].double())[mine] for name in weights}
        assert_near(outcomes[rank].same[case], wanted, dtype)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("config", SPREADABLE, ids=label)
def test_a_layer_under_any_router_computes_the_same(config: RouterConfig, outcomes: Any) -> None:
    # Of entries of size one to ten, in sums of at most 60 terms.
    assert max(found.layers[label(config)] for found in outcomes) < 1e-12


@pytest.mark.distributed
@pytest.mark.slow
def test_a_token_is_sent_once_to_a_rank(outcomes: Any) -> None:
    # Rank 0 of a pair holds experts 0, 1: of each rank it gets token 0, for both, and token 1, for expert 1.
    # Rank 1 holds experts 2, 3: it gets token 1 for expert 2, token 2 for expert 3. Token 3 stays at home.
    assert (
        outcomes[0].sent
        == outcomes[2].sent
        == [
            "[0.0, 1.0, 10.0, 11.0]",
            "[2, 4]",
            "[[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]",
        ]
    )
    assert (
        outcomes[1].sent
        == outcomes[3].sent
        == [
            "[1.0, 2.0, 11.0, 12.0]",
            "[2, 2]",
            "[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]",
        ]
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_the_shared_expert_runs_while_tokens_travel(outcomes: Any) -> None:
    there, shared, home = ["begins"] * 3 + ["shared"] + ["ends"] * 3, ["shared"], ["begins", "ends"]
    # Ids, rows and weights travel while it runs; in backward the gradients of rows and weights do.
    back = ["begins"] * 2 + shared + ["ends"] * 2
    for found in outcomes:
        assert found.order == [*there, *home, "|", *home, *back]


def test_experts_that_do_not_divide_are_refused() -> None:
    assert experts_of_a_rank(8, 4) == 2
    with pytest.raises(
        ConfigError, match=r"expert_parallel=3: .* 8 do not divide over 3. Set a divisor of 8"
    ):
        experts_of_a_rank(8, 3)
