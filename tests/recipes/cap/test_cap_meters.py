"""Memory and energy meters against counters that tests write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.tracking.meters import EnergyMeter, MemoryMeter, MemorySampler
from tests.recipes.cap.cap_systems import CPU


def rapl(root: Path, name: str, number: int, microjoules: int, wraps_at: int = 10_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_and_parts_are_not(tmp_path: Path) -> None:
    package, memory = rapl(tmp_path, "package-0", 0, 1_000_000), rapl(tmp_path, "dram", 1, 0)
    core, whole = rapl(tmp_path, "core", 2, 0), rapl(tmp_path, "psys", 3, 0)
    meter = EnergyMeter(CPU, rapl=tmp_path)
    meter.start()
    for counter, value in ((package, 3_000_000), (memory, 500_000), (core, 9_000_000), (whole, 9_000_000)):
        counter.write_text(str(value))
    joules, seconds = meter.read()
    assert joules.value == 2.5 and seconds > 0
    assert "package-0 (intel-rapl:0)" in joules.detail and "psys" not in joules.detail


def test_a_counter_that_starts_over(tmp_path: Path) -> None:
    counter = rapl(tmp_path, "package-0", 0, 9_500_000)
    meter = EnergyMeter(CPU, rapl=tmp_path)
    meter.start()
    counter.write_text("250000")
    assert meter.read()[0].value == pytest.approx(0.75)


def test_a_counter_that_stands_still_is_no_zero(tmp_path: Path) -> None:
    rapl(tmp_path, "package-0", 0, 5)
    meter = EnergyMeter(CPU, rapl=tmp_path)
    meter.start()
    joules, _ = meter.read()
    assert joules.value is None and "did not tick" in joules.detail


def test_no_meter_and_one_that_must_not_be_read(tmp_path: Path) -> None:
    meter = EnergyMeter(CPU, rapl=tmp_path)
    meter.start()
    assert meter.read()[0].value is None and "no RAPL counter" in meter.reason
    rapl(tmp_path, "package-0", 0, 5).write_text("")
    assert "RAPL cannot be read (intel-rapl:0" in EnergyMeter(CPU, rapl=tmp_path).reason
    assert EnergyMeter(torch.device("mps"), rapl=tmp_path).reason == "no meter for mps"


def test_peak_memory_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\n")
    meter = MemoryMeter(CPU, proc=tmp_path)
    meter.start()
    assert (tmp_path / "clear_refs").read_text() == "5" and meter.read().value == 2048 * 1024
    (tmp_path / "status").write_text("Name:\tx\n")
    assert meter.read().value is None
    gone = MemoryMeter(CPU, proc=tmp_path / "none")
    gone.start()
    assert gone.read().value is None and "cannot be reset" in gone.read().detail


def test_mean_memory_over_time(tmp_path: Path) -> None:
    import os

    (tmp_path / "statm").write_text("100 10 5 1 0 50 0\n")
    sampler = MemorySampler(CPU, proc=tmp_path, every=0.001)
    with sampler:
        pass
    assert sampler.read().value == 10 * os.sysconf("SC_PAGE_SIZE") and sampler.total is not None
    empty = MemorySampler(CPU, proc=tmp_path / "none")
    with empty:
        pass
    assert empty.read().value is None and "does not report" in empty.read().detail
