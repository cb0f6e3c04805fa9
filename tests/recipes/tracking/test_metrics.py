"""The log of a run and the reduction of its figures over ranks."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe.errors import DataError, DiskError
from recipes.tracking.metrics_log import Metric, MetricsLog, read_rows, reduce_metrics
from tests.distributed_helper import RanksFailedError, run_ranks


def _write(path: Path, *rows: dict) -> None:
    log = MetricsLog(path)
    for row in rows:
        log.append(row)
    log.close()


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    row = {"stage": "moe", "step": 3, "loss": 3.25, "layers": [0, 1], "load": [[0.25, 0.75], [0.5, 0.5]]}
    _write(tmp_path / "new" / "metrics.jsonl", row, {"stage": "cpt", "step": 1})
    assert list(read_rows(tmp_path / "new" / "metrics.jsonl")) == [row, {"stage": "cpt", "step": 1}]


def test_nonfinite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, {"step": 1, "loss": math.nan, "up": math.inf, "down": -math.inf, "load": [[math.nan, 1.0]]})
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["loss"] is None and raw["loss_nonfinite"] == "nan" and raw["down_nonfinite"] == "-inf"
    (row,) = read_rows(path)
    assert set(row) == {"step", "loss", "up", "down", "load"}
    assert math.isnan(row["loss"]) and row["up"] == math.inf and row["down"] == -math.inf
    assert math.isnan(row["load"][0][0]) and row["load"][0][1] == 1.0


def test_tensors_and_arrays_are_plain_numbers(tmp_path: Path) -> None:
    row = {"loss": torch.tensor(2.5), "count": np.int64(3), "nan": np.float32("nan"), "load": np.eye(2)}
    _write(tmp_path / "m.jsonl", row)
    (back,) = read_rows(tmp_path / "m.jsonl")
    assert back["loss"] == 2.5 and back["count"] == 3 and back["load"] == [[1.0, 0.0], [0.0, 1.0]]
    assert math.isnan(back["nan"])


def test_a_null_that_is_not_a_number_stays_null(tmp_path: Path) -> None:
    _write(tmp_path / "m.jsonl", {"mfu": None, "step": 1})
    assert list(read_rows(tmp_path / "m.jsonl")) == [{"mfu": None, "step": 1}]


def test_truncate_drops_one_stage_past_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for stage, step in (("moe", 1), ("moe", 2), ("cpt", 2), ("moe", 3)):
        log.append({"stage": stage, "step": step})
    assert log.truncate_after("moe", 1) == 2
    assert log.truncate_after("moe", 1) == 0
    log.append({"stage": "moe", "step": 2, "again": True})
    log.close()
    rows = [(r["stage"], r["step"]) for r in read_rows(tmp_path / "m.jsonl")]
    assert rows == [("moe", 1), ("cpt", 2), ("moe", 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_truncate_leaves_other_lines_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{ "stage": "moe",  "step": 1, "x": 0.10 }\n{"stage":"moe","step":2}\n')
    log = MetricsLog(path)
    log.truncate_after("moe", 1)
    log.close()
    assert path.read_text() == '{ "stage": "moe",  "step": 1, "x": 0.10 }\n'


@pytest.mark.parametrize("tail", ['{"stage": "mo', '{"stage": "moe", "step": 9}', "\x00" * 70_000])
def test_an_unfinished_last_line_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tail: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"stage":"moe","step":1}\n' + tail)
    with caplog.at_level(logging.WARNING):
        assert [r["step"] for r in read_rows(path)] == [1]
        assert "line 2" in caplog.text
        log = MetricsLog(path)
        assert f"{len(tail)} bytes" in caplog.text
    log.append({"stage": "moe", "step": 2})
    log.close()
    assert [r["step"] for r in read_rows(path)] == [1, 2]


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a"')
    MetricsLog(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step":1}\nxx yy\n{"step":2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl, line 2='xx yy'"):
        list(read_rows(path))


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert list(read_rows(tmp_path / "none.jsonl")) == []


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal\nfrom recipes.tracking.metrics_log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for i in range(5): log.append({'stage': 'moe', 'step': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [0, 1, 2, 3, 4]


def test_what_cannot_be_opened_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        MetricsLog(tmp_path / "file" / "m.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_disk_error(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._descriptor)
    os.close(full)
    with pytest.raises(DiskError, match="No space left"):
        log.append({"step": 1})


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.close()
    log.close()


def test_one_rank_reduces_to_itself() -> None:
    metrics = {
        "b": Metric(torch.tensor([2.5])),
        "a": Metric(3, "sum"),
        "high": Metric(torch.tensor(-1.0), "max"),
        "low": Metric(7.0, "min"),
        "lost": Metric(math.nan, "max"),
        "inf": Metric(-math.inf, "max"),
    }
    reduced = reduce_metrics(metrics)
    assert list(reduced) == list(metrics)
    assert math.isnan(reduced.pop("lost"))
    assert reduced == {"b": 2.5, "a": 3.0, "high": -1.0, "low": 7.0, "inf": -math.inf}
    assert reduce_metrics({}) == {}


def _count_collectives(rank: int, world: int) -> tuple[dict[str, float], int]:
    calls = []
    real = dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return real(*args, **kwargs)

    dist.all_reduce = counted
    metrics = {
        "mean": Metric(torch.tensor(1.0 + rank, requires_grad=True)),
        "sum": Metric(1e9 + rank, "sum"),
        "max": Metric(torch.tensor(rank, dtype=torch.int64), "max"),
        "min": Metric(5.0 - rank, "min"),
        "nan": Metric(math.nan if rank == 1 else 3.0, "max"),
        "nan_mean": Metric(math.nan if rank == 0 else 3.0),
    }
    if rank:  # the order must not matter
        metrics = dict(reversed(metrics.items()))
    return reduce_metrics(metrics, dist.group.WORLD), len(calls)


def _different_names(rank: int, world: int) -> dict[str, float]:
    return reduce_metrics({"loss" if rank else "lost": Metric(1.0)}, dist.group.WORLD)


@pytest.mark.distributed
def test_ranks_reduce_in_two_collectives() -> None:
    outcomes = run_ranks(_count_collectives, 2)
    for reduced, calls in outcomes:
        assert calls == 2
        # mean (1 + 2) / 2; sum 2e9 + 1, exact in fp64 and not in fp32; max of 0, 1; min of 5, 4
        assert [reduced[n] for n in ("mean", "sum", "max", "min")] == [1.5, 2e9 + 1, 1.0, 4.0]
        assert math.isnan(reduced["nan"]) and math.isnan(reduced["nan_mean"])


@pytest.mark.distributed
def test_ranks_with_different_figures_are_caught() -> None:
    with pytest.raises(RanksFailedError, match="the ranks reduce different figures"):
        run_ranks(_different_names, 2)
