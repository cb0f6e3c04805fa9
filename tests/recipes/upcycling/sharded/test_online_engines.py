"""Every engine trains a mixture that no rank has made whole: bit for bit the one made in one memory."""

from __future__ import annotations

import pytest

from recipes.engines import engine_classes
from tests.recipes.upcycling.sharded.conftest import LookOnRanks
from tests.recipes.upcycling.sharded.engine_online_cases import MORE, layouts


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_are_those_of_the_whole(world_size: int, look_on_ranks: LookOnRanks) -> None:
    for rank, found in enumerate(look_on_ranks(world_size)):
        differences, closely = found["engines"].differences, {" ".join(one) for one in MORE[world_size]}
        assert len(differences) == len(layouts(world_size))
        for name, cases in differences.items():
            assert cases.keys() >= ({"dense", "noise", "resumed"} if name in closely else {"noise"})
            assert not any(cases.values()), (rank, name, cases)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gate_measures_the_same_on_every_engine(world_size: int, look_on_ranks: LookOnRanks) -> None:
    for found in look_on_ranks(world_size):
        assert found["engines"].gate
        # The same passes of the same model, cut over the same ranks.
        assert set(found["engines"].gate.values()) == {0.0}


def test_no_engine_is_left_out() -> None:
    assert {options[0] for options in layouts(2)} == {f"engine={name}" for name in engine_classes()}
