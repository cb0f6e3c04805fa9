"""Ranks of one attempt find each other in a store that still holds what the attempts before have left."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from math import inf
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from torch.distributed import HashStore, Store

from moe.errors import GraftError
from recipes.runtime.rendezvous import agree_on_attempt


def attempt(store: Store, ranks: Sequence[int], world_size: int, wait_s: float = inf) -> dict[int, str]:
    """What each of the ranks that come to an attempt is told, or why it gives up.

    Rank 0 gives up only when all others that come have their answer.
    """
    told: dict[int, str] = {}

    def now() -> float:
        waits = threading.current_thread().name == "0" and len(told) < len(ranks) - 1
        return 0.0 if waits else time.monotonic()

    def join(rank: int) -> None:
        try:
            told[rank] = agree_on_attempt(store, rank, world_size, wait_s)
        except GraftError as error:
            told[rank] = f"error: {error}"

    threads = [threading.Thread(target=join, args=(rank,), name=str(rank)) for rank in ranks]
    with patch("recipes.runtime.rendezvous.time", SimpleNamespace(monotonic=now, sleep=time.sleep)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return told


def test_every_attempt_has_a_name_of_its_own() -> None:
    store, names = HashStore(), []
    for ranks in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        told = attempt(store, ranks, 3)
        assert len(told) == 3 and len(set(told.values())) == 1
        names.append(told[0])
    assert len(set(names)) == 3


def test_what_dead_ranks_have_left_is_not_taken_for_an_answer() -> None:
    store = HashStore()
    # Rank 0 was killed before it answered: the others have asked, and nobody will read the answer.
    left = attempt(store, [1, 2], 3, wait_s=0.05)
    assert all(text.startswith("error: rank 0 has not answered") for text in left.values())
    # Then rank 2 does not come: rank 1 alone is not an attempt.
    alone = attempt(store, [0, 1], 3, wait_s=0.05)
    assert alone[0].startswith("error: ranks 2 of 3 have not joined in 0 s")
    told = attempt(store, [0, 1, 2], 3)
    assert len(set(told.values())) == 1 and not told[0].startswith("error")
    assert told[1] != alone[1]


def test_one_rank_alone() -> None:
    assert agree_on_attempt(HashStore(), 0, 1) != agree_on_attempt(HashStore(), 0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_attempts_one_after_the_other(world_size: int) -> None:
    store = HashStore()
    for _ in range(20):
        assert len(set(attempt(store, range(world_size), world_size).values())) == 1
