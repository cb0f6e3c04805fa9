"""Bytes of the exchange: counted at the collectives, against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe.errors import ConfigError
from recipes.studies.benchmarks.dispatch_bytes import (
    DispatchShape,
    Needed,
    RankFigures,
    measure_rank,
    needed_rows,
    render,
    summed,
)
from tests.distributed_helper import run_ranks
from tests.recipes.studies.dispatch_count import IDS, SHAPE, count
from tools.bench_dispatch import main


@pytest.mark.distributed
@pytest.mark.slow
def test_bytes_on_the_wire_by_hand() -> None:
    zero, one = run_ranks(count, 2)
    # Rank 0 sends tokens 1 and 2, rank 1 its token 0: rows of 3 * 4 bytes. What came is sent back as sums, so
    # both send 3 rows in forward; their gradients go the same ways in backward.
    assert (zero.rows, one.rows) == (36, 36) and (zero.rows_training, one.rows_training) == (72, 72)
    # Of each row 2 ids of 4 bytes and 2 weights of 4; before it three numbers of 8 bytes to the other rank.
    assert (zero.metadata, one.metadata) == (24 + 2 * 16, 24 + 16)
    # In backward the gradients of weights, from where they have been.
    assert (zero.metadata_training, one.metadata_training) == (56 + 8, 40 + 16)
    # counts, ids, rows, weights, and the way home
    assert zero.calls == one.calls == 5
    assert zero.needed == Needed(least=2, slots=3, gathered=3)
    assert one.needed == Needed(least=1, slots=2, gathered=3)
    both = summed(SHAPE, [zero, one])
    assert both.rows == both.least == 2 * 12 * 3
    assert (both.slots, both.gathered) == (2 * 12 * 5, 2 * 12 * 6)
    assert len(zero.forward) == 3 and 0 < both.forward.p10 <= both.forward.median <= both.forward.p90


def test_needed_rows_equal_a_count_one_by_one() -> None:
    shape = DispatchShape(tokens=40, width=4, experts=8, top_k=3, skewed=True)
    ids_TK = shape.ids(2)
    least = slots = 0
    for token in ids_TK.tolist():
        ranks = [expert // 2 for expert in token]
        least += len({rank for rank in ranks if rank != 2})
        slots += sum(rank != 2 for rank in ranks)
    assert needed_rows(ids_TK, 8, 4, 2) == Needed(least, slots, 120)
    assert least < slots
    assert all(len(set(token)) == 3 for token in ids_TK.tolist())


def test_skew_prefers_low_experts() -> None:
    counts = [
        DispatchShape(2000, 4, 8, 2, skewed=skewed).ids(0).flatten().bincount(minlength=8).tolist()
        for skewed in (False, True)
    ]
    assert max(counts[0]) < 1.3 * min(counts[0]) and counts[1][0] > 3 * counts[1][7]


def test_one_rank_sends_nothing() -> None:
    alone = measure_rank(SHAPE, torch.tensor(IDS[0]), 0, 1, rounds=1)
    assert (alone.rows, alone.metadata, alone.calls, alone.needed) == (0, 0, 0, Needed(0, 0, 0))


def test_the_table_says_that_ranks_share_cores() -> None:
    figures = RankFigures(24, 8, 48, 16, 5, Needed(1, 2, 3), *[[0.1, 0.2, 0.3]] * 4)
    found = [summed(SHAPE, [figures] * ranks) for ranks in (1, 2)]
    assert "2 ranks share them, so times do not show how the exchange scales" in render(found, SHAPE, 2)
    assert "every rank has a core" in render(found, SHAPE, 64)
    # 24 bytes sent of 24 that must be: 1 row of 12 bytes there and back
    assert "1.000" in render(found, SHAPE, 2)


def test_the_command_on_one_rank(tmp_path: Path) -> None:
    target = tmp_path / "dispatch.json"
    flags = ["--ranks", "1", "--tokens", "8", "--width", "4", "--rounds", "2", "--json", str(target)]
    assert main(flags) == 0
    figures = json.loads(target.read_text(encoding="utf-8"))
    assert figures["ranks"][0]["ranks"] == 1 and figures["ranks"][0]["rows"] == 0
    with pytest.raises(ConfigError) as caught:
        main(["--ranks", "3,x", "--top-k", "9", "--tokens", "0"])
    assert {mistake.path for mistake in caught.value.mistakes} == {"--ranks", "--top-k", "--tokens"}
