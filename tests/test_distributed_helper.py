"""The helper that other tests start their ranks with."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests import distributed_helper
from tests.distributed_helper import RanksFailedError, run_ranks

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank: int, world_size: int, factor: int) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([rank * factor])
    dist.all_reduce(total)
    return rank, torch.get_num_threads(), total


def _one_fails(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("rank one is out of order")
    if rank == 1 and how == "die":
        os._exit(7)
    if how == "sleep":
        time.sleep(3600)
    dist.barrier()


def test_results_come_back_by_rank() -> None:
    # (0 + 1) * 10
    results = run_ranks(_sum_of_ranks, 2, 10)
    assert [(rank, threads, int(total)) for rank, threads, total in results] == [(0, 1, 10), (1, 1, 10)]


@pytest.mark.parametrize(
    ("how", "message", "timeout"),
    [
        ("raise", "rank one is out of order", None),
        ("die", "exit code 7", None),
        ("sleep", "not done after 0.1 s", 0.1),
        ("sleep", "not done while nothing moves", None),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(
    how: str, message: str, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "sleep":
        monkeypatch.setattr(distributed_helper, "_IDLE_SECONDS", 0.1)
        monkeypatch.setattr(distributed_helper, "_LOOK_SECONDS", 0.2)
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(_one_fails, 2, how, timeout=timeout)
