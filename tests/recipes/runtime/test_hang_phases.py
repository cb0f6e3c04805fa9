"""Outside of steps, too, a rank that sleeps is named with its phase and stack; long work is let be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.runtime.watchdog import HUNG
from tests.fork_server import Forked
from tests.patience import patience
from tests.recipes.runtime import hanging_jobs
from tests.recipes.runtime.hanging_jobs import CASES, RANKS, WORKING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs of all cases have left what they wrote."""
    folder = tmp_path_factory.mktemp("phases")
    with Forked(hanging_jobs.main, folder) as forked:
        assert forked.wait(patience(240)) == 0
    return folder


def found(place: Path, name: str) -> dict[str, Any]:
    ended: dict[str, Any] = json.loads((place / "found.json").read_text())[name]
    return ended


def told(place: Path, name: str) -> list[str]:
    return [(place / name / f"stderr-{rank}").read_text() for rank in range(RANKS)]


def test_work_that_goes_on_ends_nothing_however_long_it_takes(place: Path) -> None:
    assert set(found(place, WORKING)["codes"].values()) == {0}, told(place, WORKING)
    run = place / "outputs" / WORKING
    assert (run / "hf" / "config.json").exists() and not (run / "faults").exists()


@pytest.mark.parametrize("name", list(CASES))
def test_a_rank_that_sleeps_is_named_with_phase_and_stack(name: str, place: Path) -> None:
    case, said, ended = CASES[name], told(place, name), found(place, name)
    assert ended["codes"] == {str(rank): HUNG for rank in range(RANKS)}, said
    [verdict] = [text for text in said if "error: the run hangs" in text]
    assert f"the run hangs: rank {case.rank} has made no progress for {case.limit_s:g} s" in verdict
    [line] = [line for line in verdict.splitlines() if line.startswith(f"  rank {case.rank} ")]
    assert "is in its own code" in line and f"s in {case.where}: " in line and "sleep_here" in line
    assert f"rank {1 - case.rank} waits for other ranks" in verdict
    assert f"The limit is {case.limit}: raise it" in verdict
    assert f"rank {case.rank} hangs here:" in said[case.rank] and "in sleep_here" in said[case.rank]
    # From the sleep to the end of the last process, by the clock of the ranks.
    assert case.limit_s <= ended["passed_s"] <= 2 * case.limit_s
    [folder] = (place / "outputs" / name / "faults").iterdir()
    stacks = [(folder / f"rank-{rank:05d}.txt").read_text() for rank in range(RANKS)]
    assert ["in sleep_here" in stack for stack in stacks] == [rank == case.rank for rank in range(RANKS)]
