"""The figures of a step's row, from reports that are worked by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from moe.accounting.training import MoEBlock, StepModel
from moe.metrics import LoadReport
from recipes.tracking.step_costs import Costs, StepCosts
from recipes.tracking.step_figures import StepFigures, StepWork

MIXTURE = MoEBlock(num_experts=4, top_k=2, matrix=10, elements=12, trained=12)
STEPS = StepCosts(StepModel(100, 100, 0, (MIXTURE,), 40.0), weight_size=4, peak_bytes_per_s=1e5)
COSTS = Costs(148, 124, 400.0, 1200.0, 1e6)


def report(used: float, distinct: float = 3.0) -> LoadReport:
    return LoadReport((0,), ((0.25,) * 4,), {"experts_per_token": (used,)}, (distinct,), (distinct,))


def work(load: LoadReport | None, seconds: float = 2.0) -> StepWork:
    return StepWork(tokens=64, seconds=seconds, ranks=1, micro_batches=1, load=load)


def test_without_drops_both_are_equal() -> None:
    row = StepFigures(STEPS, COSTS).of_step(COSTS, work(report(2)))
    assert row["mfu"] == row["s_mfu"] == 1200 * 64 / (2 * 1e6)
    assert row["flops_per_token_used"] == row["flops_per_token"] == 1200
    # 2 * 4 * (100 + 36) read, 4 * (100 + 36) written, 40 of the update
    assert row["step_bytes"] == 1088 + 544 + 40
    assert row["s_mbu"] == 1672 / (2 * 1e5) and row["router/experts_touched"] == 3


def test_a_quarter_of_the_slots_dropped() -> None:
    row = StepFigures(STEPS, COSTS).of_step(COSTS, work(report(1.5)))
    # 6 FLOPs of half an expert less
    assert row["flops_per_token_used"] == 1200 - 6 * 0.5 * 10
    assert row["s_mfu"] == pytest.approx(row["mfu"] * 1170 / 1200)


def test_with_a_schedule_both_follow_the_step() -> None:
    # At the end 2 experts a token; this step has 4, as its cost says.
    now = replace(COSTS, flops_per_token_train=1200.0 + 6 * 2 * 10)
    row = StepFigures(STEPS, COSTS).of_step(now, work(report(4)))
    assert row["s_mfu"] == row["mfu"] == 1320 * 64 / 2e6


def test_what_is_not_known_is_left_out_with_its_reason() -> None:
    blind = replace(COSTS, flops_per_token_train=None)
    row = StepFigures(STEPS, blind).of_step(blind, work(report(2)))
    assert not {"mfu", "s_mfu", "flops_per_token", "flops_per_token_used"} & set(row) and "s_mbu" in row
    assert set(StepFigures(STEPS, blind).missing()) == {"mfu", "s_mfu"}
    unknown = replace(STEPS, peak_bytes_per_s=None)
    row = StepFigures(unknown, COSTS).of_step(COSTS, work(report(2)))
    assert "s_mbu" not in row and row["step_bytes"] > 0
    assert StepFigures(unknown, COSTS).missing() == {
        "s_mbu": "the memory bandwidth of the device is not known"
    }
    mixed = replace(STEPS, counts_slots=False)
    assert "s_mfu" not in StepFigures(mixed, COSTS).of_step(COSTS, work(report(4)))
    assert "mixtures of tokens" in StepFigures(mixed, COSTS).missing()["s_mfu"]
    cut = replace(STEPS, uncounted="ranks cut matrices")
    assert not {"s_mbu", "step_bytes"} & set(StepFigures(cut, COSTS).of_step(COSTS, work(report(2))))
    assert StepFigures(cut, COSTS).missing() == {"s_mbu": "ranks cut matrices"}
    plain = StepFigures(None, replace(COSTS, peak_flops=None))
    assert set(plain.of_step(plain.end, work(None))) == {"active_params", "flops_per_token"}
    assert set(plain.missing()) == {"mfu", "s_mfu", "s_mbu"}
    assert StepFigures(STEPS, COSTS).missing() == {}


def test_experts_of_several_ranks_are_read_once() -> None:
    # Two ranks, two experts each; of three that have tokens, one rank holds two.
    load = replace(report(2), busiest=(2.0,), busiest_in_step=(2.0,))
    spread, pair = replace(STEPS, readers=(2,)), replace(work(load), ranks=2, micro_batches=2)
    row = StepFigures(spread, COSTS).of_step(COSTS, pair)
    # 2 * 4 * (2 * 100 + 3 * 12) read, 4 * (2 * 100 + 3 * 12) written, 40 of the update
    assert row["step_bytes"] == 1888 + 944 + 40
    assert row["s_mbu"] == row["step_bytes"] / (2 * 1e5 * 2)
    # The busier one, with half of the update: 2 * 4 * (100 + 24) + 4 * (100 + 24) + 20
    assert row["step_bytes_busiest_rank"] == 992 + 496 + 20
    assert row["s_mbu_busiest_rank"] == 1508 / (2 * 1e5)
    assert "s_mbu_busiest_rank" not in StepFigures(STEPS, COSTS).of_step(COSTS, work(load))


def test_above_one_is_said_once_a_stage_and_by_one_rank() -> None:
    figures = StepFigures(STEPS, COSTS)
    quick = work(report(2), seconds=1e-3)
    with pytest.warns(UserWarning, match="above 1") as caught:
        for _ in range(3):
            figures.of_step(COSTS, quick)
    assert [str(each.message).split()[0] for each in caught] == ["MFU", "S-MFU", "S-MBU"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepFigures(STEPS, COSTS, verbose=False).of_step(COSTS, quick)
