"""The multi-gate model: against a row-by-row one, and the same under every router but for the router."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe.routers.configs.comet_config import CometConfig
from moe.routers.configs.hash_config import HashConfig
from moe.routers.configs.topk_config import TopKConfig
from recipes.studies.tables.auc import roc_auc
from recipes.studies.tables.generate import Rows, TableConfig, generate
from recipes.studies.tables.table_model import ModelConfig, TableModel, TableMoE
from recipes.studies.tables.train_table import FitConfig, measure, train_run

TABLE = TableConfig(num_rows=1000, num_users=20, num_items=10)
WIDTHS = ModelConfig(id_width=4, code_width=2, num_experts=4, expert_width=3, tower_width=5)
TOPK = TableMoE(TopKConfig(top_k=2), 4, 3)


@pytest.fixture(scope="module")
def splits() -> dict[str, Rows]:
    """A small set."""
    return generate(TABLE)


def by_hand(model: TableModel, rows: Rows, n: int, task: int) -> torch.Tensor:
    """The logit of one row: every expert is run, and weighed."""
    x_D = torch.cat(
        [
            model.user.weight[rows.users_N[n]],
            model.item.weight[rows.items_N[n]],
            model.segment.weight[rows.segments_N[n]],
            model.kind.weight[rows.kinds_N[n]],
            rows.context_NC[n],
        ]
    )
    layer, tower = model.layers[task], model.towers[task]
    probs_E = (layer.router.weight_ED @ x_D).softmax(0)
    best = probs_E.topk(2).indices
    out_D = torch.zeros_like(x_D)
    for e in best:
        hidden_F = F.relu(layer.experts.w_up_EUD[e] @ x_D + layer.experts.b_up_EU[e])
        y_D = layer.experts.w_down_EDF[e] @ hidden_F + layer.experts.b_down_ED[e]
        out_D = out_D + probs_E[e] / probs_E[best].sum() * y_D
    return tower(out_D)


def test_row_by_row(splits: dict[str, Rows]) -> None:
    model = TableModel(WIDTHS, TOPK, TABLE, seed=3).double().eval()
    rows = splits["test"].take(torch.arange(12))
    rows = Rows(**(vars(rows) | {"context_NC": rows.context_NC.double()}))
    expected = torch.stack([torch.cat([by_hand(model, rows, n, j) for j in range(2)]) for n in range(12)])
    # fp64 sums of at most 18 terms of size 1.
    torch.testing.assert_close(model(rows), expected, rtol=0, atol=1e-13)
    model.towers[0](torch.zeros(18, dtype=torch.float64)).sum().backward()


def test_only_the_routers_differ() -> None:
    one = TableModel(WIDTHS, TOPK, TABLE, seed=3).state_dict()
    other = TableModel(WIDTHS, TableMoE(CometConfig(), 4, 3), TABLE, seed=3).state_dict()
    shared = [name for name in one if "router" not in name]
    assert shared
    assert all(torch.equal(one[name], other[name]) for name in shared)
    third = TableModel(WIDTHS, TOPK, TABLE, seed=4).state_dict()
    assert not torch.equal(one["user.weight"], third["user.weight"])
    assert not torch.equal(one["layers.0.router.weight_ED"], one["layers.1.router.weight_ED"])


def test_tasks_share_the_experts() -> None:
    model = TableModel(WIDTHS, TOPK, TABLE, seed=3)
    assert model.layers[0].experts is model.layers[1].experts
    assert model.layers[0].router is not model.layers[1].router
    assert [layer.context.layer_index for layer in model.layers] == [0, 1]


def test_hash_goes_by_user(splits: dict[str, Rows]) -> None:
    model = TableModel(WIDTHS, TableMoE(HashConfig(top_k=2), 4, 3), TABLE, seed=0).eval()
    rows = splits["test"].take(torch.arange(50))
    model(rows)
    routing = model.layers[0].router(torch.zeros(50, 18), model.layers[0].context)
    table_VK = model.layers[0].router.table_VK.long()
    assert torch.equal(routing.expert_ids_TK, table_VK[rows.users_N])


def test_what_is_measured(splits: dict[str, Rows]) -> None:
    rows = splits["test"]
    model = TableModel(WIDTHS, TableMoE(HashConfig(top_k=2), 4, 3), TABLE, seed=0)
    found = measure(model, rows)
    assert not model.training
    with torch.no_grad():
        logits_NJ = model(rows)
    assert found.auc == tuple(
        roc_auc(rows.labels_NJ[:, j].numpy(), logits_NJ[:, j].double().numpy()) for j in range(2)
    )
    assert found.mean_auc == sum(found.auc) / 2
    assert found.experts_per_example == 2.0
    cvs = []
    for layer in model.layers:
        load_E = torch.bincount(layer.router.table_VK.long()[rows.users_N].flatten(), minlength=4).double()
        cvs.append(float(load_E.std(correction=0) / load_E.mean()))
    assert found.load_cv == pytest.approx(sum(cvs) / 2, rel=1e-6)
    assert (
        measure(TableModel(WIDTHS, TableMoE(CometConfig(), 4, 3), TABLE, 0), rows).experts_per_example == 4.0
    )


def test_no_model_beats_the_ceiling(splits: dict[str, Rows]) -> None:
    result = train_run(splits, TABLE, WIDTHS, TOPK, FitConfig(epochs=8, batch_size=64), 0, 0.01)
    for auc, ceiling in zip(result["test_auc"], splits["test"].ceilings(), strict=True):
        assert auc < ceiling
    assert result["test_auc"][0] > 0.52
    assert result["best_epoch"] > 0


def test_the_same_run_twice(splits: dict[str, Rows]) -> None:
    fit = FitConfig(epochs=2, batch_size=128)
    first, again = (train_run(splits, TABLE, WIDTHS, TOPK, fit, 1, 0.01) for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}


def test_a_run_that_diverges_keeps_what_was_best(splits: dict[str, Rows]) -> None:
    result = train_run(splits, TABLE, WIDTHS, TOPK, FitConfig(epochs=3, batch_size=64), 0, 1e30)
    assert not result["is_finite"]
    assert result["best_epoch"] == 0
    assert result["validation_auc"] == result["validation_auc"]
    assert all(0 <= auc <= 1 for auc in result["test_auc"])


def test_early_stopping(splits: dict[str, Rows]) -> None:
    # Nothing is learned at a rate of nearly 0, so that no epoch is better than another for long.
    fit = FitConfig(epochs=50, patience=2, batch_size=256)
    result = train_run(splits, TABLE, WIDTHS, TOPK, fit, 0, 1e-12)
    assert len(result["history"]) - 1 == result["best_epoch"] + 2
    assert max(h["validation_auc"] for h in result["history"]) == sum(result["validation_auc"]) / 2
