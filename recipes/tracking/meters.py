"""Meters of peak memory and energy; None with the reason where the machine has no counter.

Energy of a CPU is read from its counters under ``/sys/class/powercap`` (RAPL): packages and memory, for
all that ran on them. Energy of an NVIDIA GPU is read from NVML. Nothing is estimated from the load.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from recipes.runtime.machine_memory import status_peak_bytes

_RAPL = Path("/sys/class/powercap")
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Reading:
    """A measured quantity.

    Attributes:
        value: None where it could not be measured.
        detail: Coverage of the value, or the reason why there is none.
    """

    value: float | None
    detail: str


class MemoryMeter:
    """Peak bytes since `start`: allocated on a GPU, resident of this process on a CPU."""

    def __init__(self, device: torch.device, proc: Path = _PROC) -> None:
        self._device, self._proc = device, proc
        self._reason: str | None = None

    def start(self) -> None:
        """Resets the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError as error:
            self._reason = f"the peak of the process cannot be reset ({error.strerror})"

    def read(self) -> Reading:
        """Returns the peak since `start`."""
        if self._device.type == "cuda":
            return Reading(float(torch.cuda.max_memory_allocated(self._device)), "allocated on the GPU")
        if self._reason is not None:
            return Reading(None, self._reason)
        try:
            peak = status_peak_bytes(self._proc / "status")
        except OSError as error:
            return Reading(None, f"{self._proc}/status cannot be read ({error.strerror})")
        if peak is None:
            return Reading(None, "the system does not report the peak of a process")
        return Reading(float(peak), "resident memory of the process, libraries included")


class MemorySampler:
    """Sampler of the mean bytes in use while it is entered; a thread reads 20 times per second.

    Attributes:
        total: Bytes of the device or machine; None where unknown.
    """

    def __init__(self, device: torch.device, proc: Path = _PROC, every: float = 0.05) -> None:
        self._device, self._proc, self._every = device, proc, every
        self._values: list[float] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.total = _memory_of(device)

    def __enter__(self) -> Self:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> Reading:
        """Returns the mean."""
        if not self._values:
            return Reading(None, f"{self._device.type} does not report the memory in use")
        where = "allocated on the GPU" if self._device.type == "cuda" else "resident of the process"
        return Reading(statistics.fmean(self._values), f"{where}, mean of {len(self._values)} looks")

    def _run(self) -> None:
        while (used := self._used()) is not None:
            self._values.append(used)
            if self._ended.wait(self._every):
                return

    def _used(self) -> float | None:
        if self._device.type == "cuda":
            return float(torch.cuda.memory_allocated(self._device))
        try:
            pages = int((self._proc / "statm").read_text().split()[1])
        except OSError:
            return None
        return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


@dataclass(frozen=True)
class _Counter:
    """Counter of energy in joules, with the value at which it wraps."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None


class EnergyMeter:
    """Joules between `start` and `read`, with the time in between."""

    def __init__(self, device: torch.device, rapl: Path = _RAPL, nvml: Any = None) -> None:
        self._counters, self.reason = _counters(device, rapl, nvml)
        self._before: dict[str, float] = {}
        self._began = 0.0

    def start(self) -> None:
        """Reads the counters."""
        self._before = {counter.name: counter.read() for counter in self._counters}
        self._began = time.perf_counter()

    def read(self) -> tuple[Reading, float]:
        """Returns joules and seconds since `start`."""
        seconds = time.perf_counter() - self._began
        if not self._counters:
            return Reading(None, self.reason), seconds
        joules = {}
        for counter in self._counters:
            used = counter.read() - self._before[counter.name]
            if used < 0 and counter.wraps_at is not None:
                used += counter.wraps_at
            joules[counter.name] = used
        names = ", ".join(joules)
        still = [name for name, used in joules.items() if not used > 0]
        if still:
            return Reading(None, f"{', '.join(still)} did not tick in {seconds:.3f} s"), seconds
        return Reading(sum(joules.values()), f"{names}; all that ran on them"), seconds


def _counters(device: torch.device, rapl: Path, nvml: Any) -> tuple[list[_Counter], str]:
    """Returns the counters of a device, or the reason why there are none."""
    if device.type == "cuda":
        try:
            return [_nvml_counter(device, nvml or ctypes.CDLL("libnvidia-ml.so.1"))], ""
        except (OSError, AttributeError) as error:
            return [], f"NVML reports no energy ({error})"
    if device.type != "cpu":
        return [], f"no meter for {device.type}"
    found, refused = [], []
    for folder in sorted(rapl.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            # psys covers the packages again, core and uncore are parts of them
            if not name.startswith(("package", "dram")):
                continue
            counter = _rapl_counter(folder, f"{name} ({folder.name})")
            counter.read()
            found.append(counter)
        except (OSError, ValueError) as error:
            refused.append(f"{folder.name}: {getattr(error, 'strerror', None) or error}")
    if refused:
        return [], f"RAPL cannot be read ({'; '.join(refused)}); root may"
    return found, "" if found else f"there is no RAPL counter under {rapl}"


def _rapl_counter(folder: Path, name: str) -> _Counter:
    wraps_at = int((folder / "max_energy_range_uj").read_text()) / 1e6
    return _Counter(name, lambda: int((folder / "energy_uj").read_text()) / 1e6, wraps_at)


def _nvml_counter(device: torch.device, library: Any) -> _Counter:
    """Returns the counter of a GPU, found by its UUID because NVML numbers devices differently.

    Raises:
        OSError: A call of NVML fails.
    """

    def call(name: str, *arguments: Any) -> None:
        code = getattr(library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    call("nvmlInit_v2")
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid), ctypes.byref(handle))

    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    read()
    return _Counter("GPU (NVML)", read, None)
