"""Hash layers: tables by hand, what they balance, and what they say without token ids.

Letters: V token ids, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.errors import ConfigError
from moe.routers.configs.hash_config import HashConfig
from moe.routers.hash import HashRouter, balanced_table, random_table
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context


def _route(ids: list[list[int]], E: int = 4, **fields: Any) -> Routing:
    token_ids = torch.tensor(ids)
    router = HashRouter(HashConfig(**fields), 3, E)
    return router(torch.randn(token_ids.numel(), 3), make_context(token_ids=token_ids))


def test_modulo_worked_by_hand() -> None:
    routing = _route([[0, 5], [6, 11]], table="modulo", top_k=2)
    # id and id + 1 modulo 4
    assert routing.expert_ids_TK.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert routing.weights_TK.tolist() == [[0.5, 0.5]] * 4 and routing.slot_mask_TK is None
    assert not routing.weights_TK.requires_grad
    # Ids beyond the table share its entries: 11 is 1 in a table of ten.
    assert _route([[11]], table="modulo", table_size=10).expert_ids_TK.tolist() == [[1]]


def test_the_same_id_goes_to_the_same_expert_everywhere() -> None:
    routing = _route([[7, 3, 7], [3, 7, 7]])
    seven, three = routing.expert_ids_TK[0], routing.expert_ids_TK[1]
    assert routing.expert_ids_TK.tolist() == [
        seven.tolist() if i == 7 else three.tolist() for i in (7, 3, 7, 3, 7, 7)
    ]


def test_balanced_table_worked_by_hand() -> None:
    # By frequency: id 2 (9) to expert 0, id 0 (5) to 1, id 3 (4) to 2; loads 9, 5, 4: id 4 (3) to 2, now 7;
    # id 1 (2) to 1, now 7.
    table = balanced_table(torch.tensor([5.0, 2.0, 9.0, 4.0, 3.0]), 1, 3)
    assert table.view(-1).tolist() == [1, 1, 0, 2, 2]
    # Two experts each: 9 to 0 and 1; 5 to 2, and to 0, which ties with 1.
    two = balanced_table(torch.tensor([5.0, 9.0]), 2, 3)
    assert two.tolist() == [[2, 0], [0, 1]]


def test_counted_frequencies_balance_the_load() -> None:
    # Zipf over 2000 ids, in an order that says nothing
    frequencies = 1 / torch.arange(1, 2001, dtype=torch.float64)
    frequencies = frequencies[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    router = HashRouter(HashConfig(table="balanced", table_size=2000), 3, 8)

    def spread() -> float:
        load = torch.zeros(8, dtype=torch.float64).scatter_add_(0, router.table_VK[:, 0].long(), frequencies)
        return float(load.max() / load.mean() - 1)

    router.balance(frequencies, torch.Generator().manual_seed(1))
    # The most frequent id has 1/8.18 of all, below an eighth: it does not spoil the balance.
    assert spread() < 1e-3
    router.table_VK.copy_(random_table(2000, 1, 8, torch.Generator().manual_seed(2)))
    assert spread() > 0.2


def test_layers_differ() -> None:
    for table in ("random", "balanced"):
        router = HashRouter(HashConfig(table=table, table_size=100), 3, 8)  # type: ignore[arg-type]
        tables = []
        for seed in (1, 2):
            router.reset_parameters(torch.Generator().manual_seed(seed))
            tables.append(router.table_VK.clone())
        assert not torch.equal(*tables)


def test_random_tables_hold_all_choices_alike() -> None:
    table = random_table(60_000, 2, 3, torch.Generator().manual_seed(0))
    pairs = (table[:, 0] * 3 + table[:, 1]).bincount(minlength=9).view(3, 3)
    assert pairs.diagonal().tolist() == [0, 0, 0]
    # Six ordered pairs, 10 000 each; the standard error is 91.
    assert (pairs[~torch.eye(3, dtype=torch.bool)] - 10_000).abs().max() < 400


@pytest.mark.parametrize(
    ("token_ids", "told"),
    [(None, "no token ids"), (torch.zeros(1, 4, dtype=torch.int64), "4 token ids for 5 tokens")],
)
def test_missing_ids_are_said(token_ids: Any, told: str) -> None:
    router = HashRouter(HashConfig(table_size=10), 3, 4)
    with pytest.raises(
        ConfigError, match=rf"router.name='hash': .* the model passed {told}. Call the model with"
    ):
        router(torch.randn(5, 3), make_context(token_ids=token_ids))


def test_the_table_is_saved_and_nothing_is_trained() -> None:
    router = HashRouter(HashConfig(table_size=10, top_k=2), 3, 4)
    assert {name: (tuple(t.shape), t.dtype) for name, t in router.state_dict().items()} == {
        "table_VK": ((10, 2), torch.int32)
    }
    assert not list(router.parameters()) and router.weights_sum_to_one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0: a token needs"),
        ({"table_size": 0}, "table_size=0: a table has at least one entry"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashConfig(**fields)


def test_more_hashes_than_experts_are_refused() -> None:
    message = str(HashConfig(top_k=5).check(4))
    assert "Set router.top_k to 4 or less" in message
