"""Memory and energy of a run in progress, against counters that tests write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recipes.tracking.meters import EnergyMeter, MemoryMeter
from recipes.tracking.metrics_log import reduce_metrics
from recipes.tracking.run_meters import RunMeters, WindowFigures

CPU = torch.device("cpu")


class Machine:
    """A package with a counter, and a process with a peak."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        folder = root / "intel-rapl:0"
        folder.mkdir()
        self.proc.mkdir()
        (folder / "name").write_text("package-0\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
        self.counter = folder / "energy_uj"
        self.uses(0, 1)

    def uses(self, joules: float, mib: int) -> None:
        self.counter.write_text(str(int(joules * 1e6)))
        (self.proc / "status").write_text(f"VmHWM:\t{mib * 1024} kB\n")

    def meters(self, *, first: bool = True) -> RunMeters:
        memory = MemoryMeter(CPU, proc=self.proc)
        energy = EnergyMeter(CPU, rapl=self.root)
        return RunMeters(CPU, first_on_machine=first, memory=memory, energy=energy)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_steps_and_what_lies_between_them_are_kept_apart(machine: Machine) -> None:
    meters, window = machine.meters(), WindowFigures()
    window.begin_stage()
    machine.uses(5, 10)  # start-up
    meters.between()
    machine.uses(8, 4)  # two steps of 6 tokens: 3 J
    window.add_tokens(6)
    window.add_tokens(6)
    row = window.of_row(reduce_metrics(meters.of_window()))
    assert row == {"memory_bytes": 4 * 2**20, "energy_j": 3.0, "joules_per_token": 0.25}
    machine.uses(20, 50)  # evaluation
    meters.between()
    machine.uses(21, 5)
    window.add_tokens(4)
    row = window.of_row(reduce_metrics(meters.of_window()))
    assert row == {"memory_bytes": 5 * 2**20, "energy_j": 1.0, "joules_per_token": 0.25}
    machine.uses(22, 5)
    assert meters.total_joules() == 22 and meters.peak_bytes == 50 * 2**20
    assert meters.reasons == {}


def test_a_counter_that_has_not_ticked_comes_with_the_next(machine: Machine) -> None:
    meters, window = machine.meters(), WindowFigures()
    window.add_tokens(5)
    assert "energy_j" not in window.of_row(reduce_metrics(meters.of_window()))
    assert "did not tick" in meters.reasons["energy_j"]
    machine.uses(2, 1)
    window.add_tokens(5)
    row = window.of_row(reduce_metrics(meters.of_window()))
    assert row["energy_j"] == 2 and row["joules_per_token"] == 0.2 and not meters.reasons


def test_without_a_counter_there_is_a_reason_and_no_zero(tmp_path: Path) -> None:
    meters = RunMeters(
        CPU,
        first_on_machine=True,
        memory=MemoryMeter(CPU, proc=tmp_path / "none"),
        energy=EnergyMeter(CPU, rapl=tmp_path),
    )
    window = WindowFigures()
    window.add_tokens(1)
    assert window.of_row(reduce_metrics(meters.of_window())) == {}
    assert math.isnan(meters.total_joules())
    assert "no RAPL counter" in meters.reasons["energy_j"]
    assert "cannot be reset" in meters.reasons["memory_bytes"]


def test_a_counter_that_goes_away_does_not_stop_the_run(machine: Machine) -> None:
    meters = machine.meters()
    machine.counter.unlink()
    assert math.isnan(reduce_metrics(meters.of_window())["energy_so_far"])
    assert "cannot be read any more" in meters.reasons["energy_j"]


def test_one_rank_of_a_machine_reads_its_counters(machine: Machine) -> None:
    first, second = machine.meters(), machine.meters(first=False)
    machine.uses(6, 1)
    joules = [reduce_metrics(meters.of_window())["energy_so_far"] for meters in (first, second)]
    assert joules == [6, 0] and second.total_joules() == 0


def test_the_memory_of_a_measurement_is_not_the_runs(machine: Machine) -> None:
    machine.uses(0, 7)
    meters = machine.meters()
    with meters.aside():
        machine.uses(0, 900)
        machine.proc.joinpath("status").write_text("VmHWM:\t1024 kB\n")  # as the reset leaves it
    assert meters.peak_bytes == 7 * 2**20
