"""A rank that hangs is named with its stack, and every process ends by an exit code of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.runtime.hang import Kind, Position, verdict
from recipes.runtime.watchdog import HUNG
from tests.fork_server import Forked
from tests.patience import patience
from tests.recipes.runtime import hanging_ranks
from tests.recipes.runtime.hanging_ranks import ALONE, HANGING_RANK, LIMIT_S, RANKS

pytestmark = pytest.mark.slow

OTHERS = tuple(rank for rank in range(RANKS) if rank != HANGING_RANK)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of all cases have left what they wrote."""
    folder = tmp_path_factory.mktemp("hangs")
    with Forked(hanging_ranks.main, folder) as forked:
        assert forked.wait(patience(240)) == 0
    return folder


def codes(place: Path, case: str) -> dict[int, int]:
    found = json.loads((place / "codes.json").read_text())[case]
    return {int(rank): code for rank, code in found.items()}


def told(place: Path, case: str) -> dict[int, str]:
    return {rank: (place / case / f"stderr-{rank}").read_text() for rank in range(RANKS)}


def test_slow_work_that_is_allowed_ends_nothing(place: Path) -> None:
    assert codes(place, "none") == dict.fromkeys(range(RANKS), 0)
    assert not (place / "none" / "faults").exists()


def test_a_rank_that_sleeps_is_named_with_its_stack(place: Path) -> None:
    assert codes(place, "sleeps") == dict.fromkeys(range(RANKS), HUNG)
    said = told(place, "sleeps")
    # One rank speaks for all, and the one that is named shows its stack.
    [verdict_text] = [text for text in said.values() if "error: the run hangs" in text]
    assert f"the run hangs: rank 1 has made no progress for {LIMIT_S:g} s" in verdict_text
    assert "rank 1 is in its own code" in verdict_text and "hanging_ranks.py" in verdict_text
    assert "in moe, step 4, the update" in verdict_text
    assert verdict_text.count("waits for other ranks") == len(OTHERS)
    assert "rank 1 hangs here:" in said[1] and "in hang_here" in said[1]
    assert all("hangs here" not in said[rank] for rank in OTHERS)
    [folder] = (place / "sleeps" / "faults").iterdir()
    stacks = [(folder / f"rank-{rank:05d}.txt").read_text() for rank in range(RANKS)]
    assert "in hang_here" in stacks[1] and all("all_reduce" in stacks[rank] for rank in OTHERS)
    assert "rank 1 has made no progress" in (folder / "verdict.txt").read_text()


@pytest.mark.parametrize("case", ["stopped", "holds"])
def test_a_rank_that_does_not_answer_is_named(case: str, place: Path) -> None:
    found = codes(place, case)
    assert {rank: found[rank] for rank in OTHERS} == dict.fromkeys(OTHERS, HUNG)
    [verdict_text] = [text for text in told(place, case).values() if "error: the run hangs" in text]
    assert "nothing has been heard of rank 1" in verdict_text and "rank 1 does not answer" in verdict_text


def test_a_process_whose_interpreter_is_held_ends_by_itself(place: Path) -> None:
    assert codes(place, ALONE) == {0: 1}
    said = (place / ALONE / "stderr-0").read_text()
    assert "Timeout" in said and "in hold_alone" in said


def test_ranks_in_different_collectives_are_all_shown(place: Path) -> None:
    assert codes(place, "elsewhere") == dict.fromkeys(range(RANKS), HUNG)
    [verdict_text] = [text for text in told(place, "elsewhere").values() if "error: the run hangs" in text]
    assert "each waits for others" in verdict_text
    assert "hang_here" in verdict_text and verdict_text.count("waits for other ranks") == RANKS


def at(rank: int, metadata: int, kind: Kind) -> Position:
    return Position(rank, metadata, f"mark {metadata}", 5.0, "somewhere.py:1 here", kind)


@pytest.mark.parametrize(
    ("told", "named"),
    [
        # Two of three wait, the third is asleep.
        ([at(0, 7, "collective"), at(1, 7, "elsewhere"), at(2, 7, "collective")], (1,)),
        # One is a mark behind, in a collective of its own: who waits there is not ahead of it.
        ([at(0, 7, "collective"), at(1, 6, "collective"), at(2, 7, "collective")], (1,)),
        # The one behind counts, not one that is ahead and in its own code.
        ([at(0, 8, "elsewhere"), at(1, 6, "elsewhere"), at(2, 7, "collective")], (1,)),
        # Behind are two, of which one waits.
        ([at(0, 6, "collective"), at(1, 6, "elsewhere"), at(2, 7, "collective")], (1,)),
        # Under DDP others wait within their backward pass.
        ([at(0, 7, "backward"), at(1, 7, "elsewhere"), at(2, 7, "backward")], (1,)),
        ([at(0, 7, "collective"), at(1, 7, "collective"), at(2, 7, "backward")], ()),
        # Silence comes first.
        ([at(0, 7, "collective"), at(2, 6, "elsewhere")], (1,)),
    ],
)
def test_who_is_named(told: list[Position], named: tuple[int, ...]) -> None:
    text, found = verdict(told, 3, 5.0)
    assert found == named
    assert all(f"rank {position.rank} " in text for position in told)


def test_ranks_that_have_ended_are_no_silent_ones() -> None:
    done = verdict([at(0, 7, "elsewhere")], 3, 5.0, {1: "", 2: ""})
    assert done[1] == (0,) and "rank 0 has made no progress" in done[0] and "rank 1 has ended" in done[0]
    failed = verdict([at(0, 7, "collective")], 3, 5.0, {1: "", 2: "ValueError: no"})
    assert failed[1] == (2,) and "rank 2 has ended, and the others have waited" in failed[0]
    assert "rank 2 has ended: ValueError: no" in failed[0]
    silent = verdict([at(0, 7, "collective")], 3, 5.0, {2: ""})
    assert silent[1] == (1,) and "nothing has been heard of rank 1" in silent[0]
