"""Which peaks a report has and where they are from; bandwidth kernels by their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe.accounting.device_peaks import TABLE
from moe.errors import ConfigError
from recipes.tracking.ceilings import find_ceilings, served_ceilings
from recipes.tracking.measure_peaks import (
    BANDWIDTH,
    last_cache_bytes,
    measure_bandwidth,
    rate_of,
    table_bandwidth,
)
from tests.recipes.cap.cap_systems import CPU
from tools.peaks import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_best_median_and_spread_by_hand() -> None:
    rate = rate_of([4.0, 1.0, 2.0, 3.0, 5.0], "x")
    assert (rate.best, rate.median, rate.p10, rate.p90, rate.rounds) == (5.0, 3.0, 1.0, 5.0, 5)
    assert rate.noisy and not rate_of([5.0, 4.9, 4.8], "x").noisy


def test_bytes_of_the_kernels_are_counted_as_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every kernel takes a second: its rate is its bytes. One MiB: read 1, copy 2, triad 3, gemv 1.
    def a_second_each(work: dict[str, object], rounds: int, *others: object) -> dict[str, list[float]]:
        return {name: [1.0] * rounds for name in work}

    monkeypatch.setattr("recipes.tracking.measure_peaks.interleave", a_second_each)
    rates = measure_bandwidth(CPU, torch.bfloat16, rounds=2, num_bytes=2**20)
    found = {name: rate.best / 2**20 for name, rate in rates.items()}
    assert found == {"read": 1, "copy": 2, "triad": 3, "gemv": 1}


def test_arrays_are_larger_than_the_last_cache(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(CPU, tmp_path) == 32 * 2**20
    assert last_cache_bytes(CPU, tmp_path / "none") == 64 * 2**20
    with pytest.raises(ValueError, match="rounds=0"):
        measure_bandwidth(CPU, rounds=0)


def test_the_users_own_go_before_everything() -> None:
    found = find_ceilings(CPU, torch.float32, "table", bytes_per_s=1.0, flops=2.0)
    assert [found.bytes_per_s.source, found.flops.source] == ["user", "user"]
    assert (found.machine.bytes_per_s, found.machine.flops) == (1.0, 2.0)


def test_an_unknown_device_has_no_peak() -> None:
    found = find_ceilings(CPU, torch.float32, "table")
    assert found.bytes_per_s.value is found.flops.value is None and "does not know" in found.flops.detail
    assert served_ceilings(None, torch.bfloat16).flops.value is None
    known = served_ceilings("NVIDIA H200", torch.bfloat16)
    assert (known.bytes_per_s.value, known.flops.value) == (4.8e12, 989e12)
    assert served_ceilings("NVIDIA H200", torch.float32).flops.value is None


def test_both_tables_name_their_devices_alike() -> None:
    assert table_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9 and table_bandwidth("NVIDIA H200 MIG") is None
    assert all(value > 100 for value in BANDWIDTH.values())
    assert {row for row in TABLE if "H100" in row} <= BANDWIDTH.keys()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure_bandwidth
    monkeypatch.setattr(
        "recipes.tracking.measure_peaks.measure_bandwidth",
        lambda device, dtype, rounds: real(device, dtype, rounds, num_bytes=2**20),
    )
    path = tmp_path / "peaks.json"
    flags = ["--rounds", "2", "--seconds", "0.01", "--dtypes", "fp32", "--threads", "1"]
    assert main([*flags, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["bytes_per_s"].keys() == {"read", "copy", "triad", "gemv"}
    assert figures["flops"]["float32"]["best"] > 0 and figures["threads"] == 1


def test_mistakes_of_the_command() -> None:
    with pytest.raises(ConfigError) as error:
        main(["--rounds", "0", "--seconds", "0", "--threads", "0", "--dtypes", "fp64", "--device", "cuda:9"])
    paths = [mistake.path for mistake in error.value.mistakes]
    assert paths == ["--rounds", "--seconds", "--threads", "--dtypes", "--device"]
