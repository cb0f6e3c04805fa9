"""Routing statistics worked by hand.

Letters: T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.metrics import LayerStats, LoadReport, report_load
from moe.types import Routing


def _routing(ids: list[list[int]], E: int, **fields: Any) -> Routing:
    ids_TK = torch.tensor(ids)
    return Routing(ids_TK, torch.ones(ids_TK.shape), E, **fields)


def _report(*entries: tuple[Routing, Tensor | None]) -> LoadReport:
    stats = LayerStats()
    for micro_batch, (routing, mask_T) in enumerate(entries):
        stats.record(micro_batch, routing, mask_T)
    report = report_load([(0, stats)])
    assert report is not None
    return report


def _only(report: LoadReport, name: str) -> float:
    (value,) = report.per_layer[name]
    return value


def test_load_worked_by_hand() -> None:
    # Slots: expert 0 has 4, expert 1 has 2, expert 2 has 2, expert 3 has none; mean 2.
    report = _report((_routing([[0, 1], [0, 2], [0, 1], [0, 2]], 4), None))
    assert report.layers == (0,)
    assert report.load == ((0.5, 0.25, 0.25, 0.0),)
    # largest over mean, minus one: 4 / 2 - 1
    assert _only(report, "maxvio") == 1.0
    # deviations 2, 0, 0, -2: sqrt(8 / 4) / 2
    assert _only(report, "load_cv") == pytest.approx(math.sqrt(2) / 2)
    assert _only(report, "dead_experts") == 1
    assert _only(report, "dropped_fraction") == 0


def test_perfect_balance() -> None:
    report = _report((_routing([[0, 1], [2, 3]], 4), None))
    assert (_only(report, "maxvio"), _only(report, "load_cv"), _only(report, "dead_experts")) == (0, 0, 0)
    assert report.load == ((0.25,) * 4,)


def test_entropy_worked_by_hand() -> None:
    # Token 0 is certain: 0. Token 1 is uniform over 4: ln 4. Token 2 is even between two: ln 2 = ln 4 / 2.
    # In units of ln 4: (0 + 1 + 1/2) / 3
    scores_TE = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    routing = _routing([[0], [1], [1]], 4, scores_TE=scores_TE)
    assert _only(_report((routing, None)), "entropy") == pytest.approx(0.5)
    # Scores that do not sum to 1 (sigmoid) are normalised first.
    tripled = _routing([[0], [1], [1]], 4, scores_TE=3 * scores_TE)
    assert _only(_report((tripled, None)), "entropy") == pytest.approx(0.5)
    # Token 2 as padding: (0 + 1) / 2;  token 0 as padding: (1 + 1/2) / 2
    for mask, expected in (([True, True, False], 0.5), ([False, True, True], 0.75)):
        assert _only(_report((routing, torch.tensor(mask))), "entropy") == pytest.approx(expected)
    # Scores that all round to zero have none.
    assert _only(_report((_routing([[0], [1]], 2, scores_TE=torch.zeros(2, 2)), None)), "entropy") == 0.0
    assert _only(_report((_routing([[0], [0]], 1, scores_TE=torch.ones(2, 1)), None)), "entropy") == 0.0
    assert _only(_report((_routing([[0], [1]], 2), None)), "entropy") == 0.0


def test_importance_and_experts_per_token_worked_by_hand() -> None:
    # Probabilities sum to 1.5 and 0.5 over the real tokens: mean 1, deviation 1/2. Slots: 3 of 2 tokens.
    scores_TE = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 9.0]])
    used_TK = torch.tensor([[True, False], [True, True], [True, True]])
    routing = _routing([[0, 1], [0, 1], [1, 0]], 2, scores_TE=scores_TE, slot_mask_TK=used_TK)
    report = _report((routing, torch.tensor([True, True, False])))
    assert _only(report, "importance_cv") == pytest.approx(0.5)
    assert _only(report, "experts_per_token") == 1.5
    # Two micro-batches: (1.5, 0.5) + (0, 1) = (1.5, 1.5).
    other = _routing([[1]], 2, scores_TE=torch.tensor([[0.0, 3.0]]))
    report = _report((routing, torch.tensor([True, True, False])), (other, None))
    assert _only(report, "importance_cv") == pytest.approx(0, abs=1e-7)
    assert _only(_report((_routing([[0], [1]], 2), None)), "importance_cv") == 0.0


def test_unused_slots_are_dropped_and_padding_is_not() -> None:
    # Six slots; the last token is padding, so four count; of these one is unused: 1 / 4.
    # Used: expert 0 twice, expert 1 once. The id in the unused slot is nonsense.
    mask_TK = torch.tensor([[True, True], [True, False], [True, True]])
    routing = _routing([[0, 1], [0, 99], [2, 2]], 3, slot_mask_TK=mask_TK)
    report = _report((routing, torch.tensor([True, True, False])))
    assert _only(report, "dropped_fraction") == 0.25
    assert report.load[0] == pytest.approx((2 / 3, 1 / 3, 0.0))
    assert _only(report, "dead_experts") == 1


def test_micro_batches_add_up() -> None:
    # Expert 0 gets 2 + 0, expert 1 gets 0 + 1, with one token of three wasted on neither: loads 2/3 and 1/3.
    report = _report((_routing([[0], [0]], 2), None), (_routing([[1]], 2), None))
    assert report.load[0] == pytest.approx((2 / 3, 1 / 3))
    assert _only(report, "maxvio") == pytest.approx(2 / 1.5 - 1)


def test_distinct_experts_worked_by_hand() -> None:
    # Micro-batch 0 uses experts 0, 1; its padding (expert 3) and its dropped slot (expert 2) use none.
    # Micro-batch 1 uses expert 1 alone. A micro-batch: (2 + 1) / 2; the step: experts 0 and 1.
    kept_TK = torch.tensor([[True, True], [True, False], [True, True]])
    first = _routing([[0, 1], [0, 2], [3, 3]], 4, slot_mask_TK=kept_TK)
    report = _report((first, torch.tensor([True, True, False])), (_routing([[1, 1]], 4), None))
    assert report.distinct == (1.5,) and report.distinct_in_step == (2.0,)
    assert report.busiest == report.distinct and report.busiest_in_step == report.distinct_in_step
    assert "distinct" not in report.per_layer


def test_recording_again_overwrites() -> None:
    stats = LayerStats()
    stats.record(0, _routing([[0], [0]], 2, losses={"balance": torch.tensor(9.0)}), None)
    stats.record(0, _routing([[1], [0]], 2, losses={"balance": torch.tensor(3.0)}), None)
    report = report_load([(0, stats)])
    assert report is not None and report.load == ((0.5, 0.5),)
    assert _only(report, "balance_loss") == 3.0


def test_losses_are_averaged_and_the_largest_logit_is_kept() -> None:
    report = _report(
        (
            _routing([[0]], 2, losses={"balance": torch.tensor(1.0)}, logits_TE=torch.tensor([[-7.0, 2.0]])),
            None,
        ),
        (
            _routing([[1]], 2, losses={"balance": torch.tensor(4.0)}, logits_TE=torch.tensor([[3.0, 5.0]])),
            None,
        ),
    )
    assert _only(report, "balance_loss") == 2.5
    assert _only(report, "logit_max") == 7.0


def test_layers_stay_apart_and_are_averaged() -> None:
    first, second = LayerStats(), LayerStats()
    first.record(0, _routing([[0], [0]], 2, losses={"balance": torch.tensor(2.0)}), None)
    # Another number of experts, another loss.
    second.record(0, _routing([[0], [1], [2], [2]], 3, losses={"z": torch.tensor(8.0)}), None)
    report = report_load([(3, first), (7, second)])
    assert report is not None and report.layers == (3, 7)
    assert report.load == ((1.0, 0.0), (0.25, 0.25, 0.5))
    # 2 / 1 - 1 and 2 / (4/3) - 1
    assert report.per_layer["maxvio"] == pytest.approx((1.0, 0.5))
    assert report.per_layer["balance_loss"] == (2.0, 0.0) and report.per_layer["z_loss"] == (0.0, 8.0)
    means = report.means()
    assert means["maxvio"] == pytest.approx(0.75) and means["z_loss"] == 4.0
    assert set(means) == set(report.per_layer)


def test_a_report_clears_the_step() -> None:
    stats = LayerStats()
    stats.record(0, _routing([[0]], 2, logits_TE=torch.zeros(1, 2), losses={"z": torch.tensor(1.0)}), None)
    assert report_load([(0, stats)]) is not None
    assert not stats.sums and not stats.logit_max and not stats.losses
    assert report_load([(0, stats)]) is None


def test_nothing_recorded_gives_no_report() -> None:
    assert report_load([]) is None
    assert report_load([(0, LayerStats())]) is None


def test_only_padding_gives_finite_figures() -> None:
    routing = _routing([[0], [1]], 2, scores_TE=torch.full((2, 2), 0.5), logits_TE=torch.ones(2, 2))
    report = _report((routing, torch.tensor([False, False])))
    assert all(math.isfinite(v) for values in report.per_layer.values() for v in values)
    assert report.load == ((0.0, 0.0),)


def test_no_graph_is_kept() -> None:
    stats = LayerStats()
    logits_TE = torch.randn(3, 2, requires_grad=True)
    routing = _routing(
        [[0], [1], [0]],
        2,
        scores_TE=logits_TE.softmax(-1),
        logits_TE=logits_TE,
        losses={"z": logits_TE.square().sum()},
    )
    stats.record(0, routing, None)
    kept = [stats.sums[0], stats.logit_max[0], *stats.losses[0].values()]
    assert not any(value.requires_grad for value in kept)
