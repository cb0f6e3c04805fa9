"""What the ranks make of a mixture, each its own part, is bit for bit what is made of it in one memory."""

from __future__ import annotations

import pytest

from moe.upcycle import upcycle_methods
from tests.conftest import MakeCheckpoint
from tests.recipes.upcycling.sharded.case_list import methods
from tests.recipes.upcycling.sharded.conftest import LookOnRanks


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_those_of_the_whole(world_size: int, look_on_ranks: LookOnRanks) -> None:
    for rank, found in enumerate(look_on_ranks(world_size)):
        assert len(found["differences"]) > 5
        assert not (bad := {name: lines for name, lines in found["differences"].items() if lines}), (
            rank,
            bad,
        )


def test_no_method_is_left_out(make_checkpoint: MakeCheckpoint, branches: list[str]) -> None:
    every = methods(make_checkpoint, branches).values()
    assert {case.method.name for case in every if case.method} == set(upcycle_methods())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_goes_on_reads_nothing_dense(world_size: int, look_on_ranks: LookOnRanks) -> None:
    assert [found["resumed"] for found in look_on_ranks(world_size)] == [[]] * world_size
