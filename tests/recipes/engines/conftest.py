"""Trainings of the engine tests, each case run once on each number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.recipes.engines import case_list
from tests.recipes.engines.engine_cases import Outcome, run_cases
from tests.shared_runs import Lazily, on_ranks

RunOnRanks = Callable[[int], list[Mapping[str, Outcome]]]
# Cases of which several are needed by one test, so that they are run together.
_BATCH = 4


@pytest.fixture(scope="session")
def run_on_ranks() -> RunOnRanks:
    """By number of ranks: of every rank, the outcome of every case."""

    def run(world_size: int) -> list[Mapping[str, Outcome]]:
        cases = case_list.on_ranks(world_size)
        names = sorted(cases)

        def outcome(rank: int) -> Callable[[str], Any]:
            def of(name: str) -> Any:
                first = names.index(name) // _BATCH * _BATCH
                batch = {one: cases[one] for one in names[first : first + _BATCH]}
                return on_ranks(world_size, run_cases, batch)[rank][name]

            return of

        return [Lazily(names, outcome(rank)) for rank in range(world_size)]

    return run
