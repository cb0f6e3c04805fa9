"""What a rank holds while its part is made: its part, and less than a layer besides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from recipes.studies.benchmarks.shard_memory import (
    SIZES,
    Layout,
    RankFailedError,
    measure_layout,
    write_dense,
)
from recipes.studies.benchmarks.shard_rank import PeakMeter
from tests.forked_python import interpreter
from tests.shared_runs import once, shared_folder
from tools.bench_sharded import _line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by Linux alone")
_MIB = 2**20


@pytest.fixture
def forked_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks import nothing: what they hold is measured from where they begin."""
    python = interpreter(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setenv("PYTHON_EXEC", python)


def _written() -> tuple[Path, Path]:
    tiny, (dense,) = write_dense(SIZES[:1], shared_folder("online-memory"))
    return tiny, dense


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_hold_their_part_and_less_than_a_layer() -> None:
    tiny, dense = once(_written)
    found = measure_layout(dense, tiny, Layout(ranks=2))
    assert sum(rank.shard for rank in found) == pytest.approx(found[0].moe, rel=0.01)
    for rank in found:
        # So large that holding it whole, or the dense model besides, could not be missed.
        assert rank.moe - rank.shard > 2 * rank.layer and rank.dense > rank.layer
        assert 0.95 * rank.shard < rank.making <= rank.shard + rank.layer
        # A layer is gathered beside the buffer that it came in, embeddings stay, and there are activations.
        assert rank.check is not None
        assert rank.making < rank.check <= rank.shard + 2 * rank.layer + rank.outside + 8 * _MIB
        # bf16 files: every expert is a copy, so that a rank reads all networks and half of the rest.
        assert rank.dense / 4 < rank.read < 1.1 * rank.dense / 2
    row = {"ranks": 2, "expert_parallel": 1, "whole": False, "by_rank": [vars(rank) for rank in found]}
    assert _line(row).split()[3:5] == ["2", "1"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, expert_parallel=2, engine="megatron"),
        Layout(2, engine="deepspeed", options=(("zero_stage", 3),)),
    ],
    ids=lambda layout: layout.engine,
)
def test_other_engines_hold_their_part_and_its_gradients(layout: Layout) -> None:
    tiny, dense = once(_written)
    for rank in measure_layout(dense, tiny, layout):
        assert rank.moe - rank.shard > 1.5 * rank.layer
        # Both have laid out a gradient for every weight of the part by then.
        held = rank.shard + rank.besides
        assert rank.shard - 2 * _MIB < rank.besides < rank.shard + 6 * _MIB
        assert 0.95 * held < rank.making < held + rank.layer
        # What the gate has made is gone before the part is made: together they would not fit.
        gate = rank.moe // layout.ranks + 2 * rank.layer + rank.outside + 8 * _MIB
        assert rank.check is not None
        assert rank.check < max(gate, held + rank.layer) < held + rank.moe // layout.ranks


def test_the_meter_sees_what_is_held_for_a_moment() -> None:
    meter = PeakMeter(torch.device("cpu"))
    torch.ones(48 * _MIB // 4).sum()
    assert 46 * _MIB < meter.peak() < 64 * _MIB
    assert PeakMeter(torch.device("cpu")).peak() < 8 * _MIB


def test_a_rank_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RankFailedError, match="a rank of Layout"):
        measure_layout(tmp_path, tmp_path, Layout(ranks=1))
