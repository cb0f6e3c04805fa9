"""Trainings of the engine tests, each number of ranks started once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed_helper import run_ranks
from tests.recipes.engines.case_list import on_ranks
from tests.recipes.engines.engine_cases import Outcome, run_cases

RunOnRanks = Callable[[int], list[dict[str, Outcome]]]


@pytest.fixture(scope="session")
def run_on_ranks() -> RunOnRanks:
    """By number of ranks: of every rank, the outcome of every case."""
    done: dict[int, list[dict[str, Outcome]]] = {}

    def run(world_size: int) -> list[dict[str, Outcome]]:
        if world_size not in done:
            done[world_size] = run_ranks(run_cases, world_size, on_ranks(world_size), timeout=300.0)
        return done[world_size]

    return run
