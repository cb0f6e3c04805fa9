"""Goodput of runs that were stopped, killed and gone on with, worked by hand."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from recipes.runtime.clock import steady_time
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.tracking.goodput import GoodputLedger
from recipes.tracking.metrics_log import MetricsLog
from recipes.tracking.training_figures import summarise_stage


def write(run_dir: Path, rows: list[tuple[int, float, float]]) -> None:
    """Rows of step, seconds and the time at which they were written."""
    log = MetricsLog(run_dir / "metrics.jsonl")
    for step, seconds, now in rows:
        log.append({"stage": "moe", "step": step, "step_s": seconds, "time": now})
    log.close()


def test_a_run_without_interruption(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, started=100.0)
    for _ in range(3):
        ledger.add_step(10.0)
    assert ledger.goodput(140.0) == 30 / 40
    found = ledger.figures(150.0, {"evaluation": 4.0, "saving": 6.0})
    assert found == {
        "goodput": 30 / 50,
        "goodput_while_running": 30 / 50,
        "wall_s": 50.0,
        "steps_s": 30.0,
        "lost_steps_s": 0.0,
        "evaluation_s": 4.0,
        "saving_s": 6.0,
        "other_s": 10.0,
        "down_s": 0.0,
        "processes": 1,
        "recoveries": 0,
        "recovery_s": 0.0,
        "recovery_worst_s": 0.0,
    }


def test_a_killed_run_and_its_lost_steps(tmp_path: Path) -> None:
    # From 100 s on three steps of 10 s, the last row at 140 s; then killed, without a word.
    GoodputLedger(tmp_path, started=100.0)
    write(tmp_path, [(1, 10.0, 115.0), (2, 10.0, 125.0), (3, 10.0, 140.0)])
    # At 200 s it goes on from step 1: two rows are dropped, and two steps done again.
    ledger = GoodputLedger(tmp_path, started=200.0)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.truncate_after("moe", 1) == 2
    log.close()
    ledger.recount()
    ledger.add_step(10.0)
    ledger.add_step(10.0)
    found = ledger.figures(240.0, {"evaluation": 1.0, "saving": 2.0})
    assert found["goodput"] == 30 / 140 and found["wall_s"] == 140
    assert found["goodput_while_running"] == 30 / 80
    assert (found["steps_s"], found["lost_steps_s"], found["down_s"]) == (30, 20, 60)
    # 80 s there were: 30 count, 20 are lost, 3 aside
    assert (found["other_s"], found["processes"]) == (27, 2)


def test_a_stopped_run_says_when_it_ended(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, started=100.0)
    ledger.add_step(5.0)
    with patch("recipes.tracking.goodput.steady_time", lambda: 120.0):
        ledger.close({"evaluation": 2.0, "saving": 0.0})
    write(tmp_path, [(1, 5.0, 110.0)])
    found = GoodputLedger(tmp_path, started=150.0).figures(160.0, {})
    assert (found["steps_s"], found["evaluation_s"], found["down_s"], found["wall_s"]) == (5, 2, 30, 60)
    assert [part["started"] for part in read_run_file(tmp_path)["parts"]] == [100, 150]


def test_a_recovery_lasts_from_the_last_step_to_the_next(tmp_path: Path) -> None:
    # Killed behind the row of 140 s; the next process does not come to a step and is killed as well.
    GoodputLedger(tmp_path, started=100.0)
    write(tmp_path, [(1, 10.0, 115.0), (2, 10.0, 140.0)])
    assert GoodputLedger(tmp_path, started=150.0).recovery(151.0) == 11
    GoodputLedger(tmp_path, started=160.0)
    third = GoodputLedger(tmp_path, started=200.0)
    third.add_step(10.0)
    # The second process had come to a step at 151 s, but left no row of it: the last row counts.
    assert third.recovery(230.0) == 90
    assert third.recovery(240.0) is None
    found = third.figures(250.0, {})
    assert (found["recoveries"], found["recovery_s"], found["recovery_worst_s"]) == (2, 101, 90)


@pytest.mark.parametrize(("failed", "recovery"), [(False, None), (True, 50.0)])
def test_only_failures_are_recovered_from(failed: bool, recovery: float | None, tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, started=100.0)
    with patch("recipes.tracking.goodput.steady_time", lambda: 125.0):
        ledger.close({}, failed=failed)
    write(tmp_path, [(1, 5.0, 120.0)])
    assert GoodputLedger(tmp_path, started=150.0).recovery(170.0) == recovery


def test_a_failure_before_any_step_begins_with_its_process(tmp_path: Path) -> None:
    # Stopped by its user at 125 s; begun again at 900 s and killed before a step.
    ledger = GoodputLedger(tmp_path, started=100.0)
    with patch("recipes.tracking.goodput.steady_time", lambda: 125.0):
        ledger.close({})
    write(tmp_path, [(1, 5.0, 120.0)])
    GoodputLedger(tmp_path, started=900.0)
    assert GoodputLedger(tmp_path, started=950.0).recovery(970.0) == 70


def test_steps_that_were_skipped_or_undone_do_not_count(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        more = {4: {"skipped": 1}, 5: {"skipped": 1, "went_back_to": 2}}.get(step, {})
        log.append({"stage": "moe", "step": step, "step_s": 10.0, "time": 100.0 + 10 * step} | more)
    log.append({"stage": "cpt", "step": 3, "step_s": 1.0, "time": 170.0})
    log.close()
    ledger = GoodputLedger(tmp_path, started=100.0)
    ledger.recount()
    # Steps 1, 2 and 6 of one leg, and the third of another: 3 is undone, 4 and 5 were skipped.
    assert ledger.goodput(162.0) == 31 / 62


def test_a_stage_is_a_ratio_of_sums() -> None:
    # 1 s at 0.4 and 3 s at 0.2: 1.0 of 4; 8 tokens/s and 4 tokens/s: 20 tokens
    rows = [
        {"step": 0, "val_loss": 5.0},
        {"step_s": 1.0, "s_mbu": 0.4, "mfu": 0.1, "tokens_per_s": 8.0, "memory_bytes": 7},
        {"step_s": 3.0, "s_mbu": 0.2, "tokens_per_s": 4.0, "energy_j": 40.0, "joules_per_token": 2.0},
    ]
    found = summarise_stage(rows)
    assert found["s_mbu"] == pytest.approx(0.25) and found["tokens_per_s"] == 5
    # A step without its share: the sum is not known.
    assert found["mfu"] is None and found["s_mfu"] is None
    assert (found["memory_bytes"], found["energy_j"], found["joules_per_token"]) == (7, 40, 2)
    assert set(summarise_stage([]).values()) == {None}


def test_a_clock_that_was_set_back_between_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GoodputLedger(tmp_path, started=8000.0)
    write(tmp_path, [(1, 10.0, 8015.0), (2, 10.0, 8030.0)])
    # Two hours back: the process began at 800 s, 5 s before now, and its times go on behind 8030 s.
    ledger = GoodputLedger(tmp_path, started=800.0, now=805.0)
    assert capsys.readouterr().err.count("the clock is 7225 s behind the run's last record") == 1
    with patch("recipes.tracking.goodput.steady_time", lambda: 825.0):
        assert ledger.now() == 8050.0
        ledger.add_step(10.0)
        assert ledger.recovery(ledger.now()) == 20.0
        found = ledger.figures(ledger.now(), {})
        ledger.close({})
    assert (found["goodput"], found["wall_s"], found["down_s"]) == (30 / 50, 50.0, 0.0)
    assert read_run_file(tmp_path)["parts"][-1]["ended"] == 8050.0
    # The third sees the clock put right again.
    later = GoodputLedger(tmp_path, started=8100.0, now=8105.0)
    assert later.figures(8110.0, {})["wall_s"] == 110.0
    assert capsys.readouterr().err == ""


def test_files_of_a_clock_that_was_set_give_no_odd_shares(tmp_path: Path) -> None:
    write_run_file(tmp_path, parts=[{"started": 9000.0, "ended": 1800.0, "steps_s": 50.0}])
    write(tmp_path, [(1, 50.0, 1790.0)])
    found = GoodputLedger(tmp_path, started=1800.0, now=1800.0).figures(1805.0, {})
    assert 0 <= found["goodput"] <= 1 and 0 <= found["goodput_while_running"] <= 1
    assert min(found.values()) >= 0


def test_the_steady_time_does_not_follow_the_clock() -> None:
    before = steady_time()
    with patch("time.time", lambda: 0.0):
        assert steady_time() >= before
