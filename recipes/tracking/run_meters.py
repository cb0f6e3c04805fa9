"""Memory and energy of a run in progress, read every few steps.

Rows hold the use of the steps; the total, with everything between them, is known at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch

from recipes.tracking.meters import EnergyMeter, MemoryMeter, Reading
from recipes.tracking.metrics_log import Metric

_JOULES, _MEMORY = "energy_so_far", "memory_bytes"


class RunMeters:
    """The meters of one rank.

    Attributes:
        peak_bytes: Largest memory of this process that a window has seen.
        reasons: Reasons for missing figures, by name.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        first_on_machine: bool,
        memory: MemoryMeter | None = None,
        energy: EnergyMeter | None = None,
    ) -> None:
        """Starts both.

        Args:
            device: Device of this rank.
            first_on_machine: True on the one rank that reads a CPU's counters for its machine.
            memory: None for the device's own.
            energy: None for the device's own.
        """
        self.peak_bytes = 0.0
        self.reasons: dict[str, str] = {}
        self._memory = memory or MemoryMeter(device)
        self._reads_energy = device.type == "cuda" or first_on_machine
        self._energy = (energy or EnergyMeter(device)) if self._reads_energy else None
        self._steps_j, self._other_j = 0.0, 0.0
        if self._energy is not None and self._energy.reason:
            self.reasons["energy_j"], self._energy = self._energy.reason, None
        self._guarded(EnergyMeter.start)
        self._memory.start()

    def of_window(self) -> dict[str, Metric]:
        """Returns the use of the steps since the last call, to reduce over the ranks; see `WindowFigures`."""
        peak = self._take_peak()
        self._steps_j += self._lap()
        joules = math.nan if self._reads_energy and self._energy is None else self._steps_j
        return {_MEMORY: Metric(math.nan if peak is None else peak, "max"), _JOULES: Metric(joules, "sum")}

    def between(self) -> None:
        """Excludes the work since the last call from the figures of the steps."""
        self._take_peak()
        self._other_j += self._lap()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Excludes the memory of enclosed work, such as a measurement of the machine."""
        self._take_peak()
        yield
        self._memory.start()

    def total_joules(self) -> float:
        """Returns all joules since the start; NaN where not measured, 0 on ranks that read no counter."""
        self.between()
        joules = self._steps_j + self._other_j
        return math.nan if self._reads_energy and not joules > 0 else joules

    def _lap(self) -> float:
        """Returns the joules since the last call; a counter that has not ticked yet is read next time."""
        read = self._guarded(lambda meter: meter.read()[0])
        if read is None:
            return 0.0
        if read.value is None:
            self.reasons["energy_j"] = read.detail
            return 0.0
        self.reasons.pop("energy_j", None)
        self._guarded(EnergyMeter.start)
        return read.value

    def _guarded(self, use: Callable[[EnergyMeter], Reading | None]) -> Reading | None:
        """Reads a counter; one that fails is given up with the reason, and training continues."""
        if self._energy is None:
            return None
        try:
            return use(self._energy)
        except (OSError, ValueError) as error:
            self.reasons["energy_j"] = f"a counter cannot be read any more ({error})"
            self._energy = None
            return None

    def _take_peak(self) -> float | None:
        reading = self._memory.read()
        self._memory.start()
        if reading.value is None:
            self.reasons["memory_bytes"] = reading.detail
            return None
        self.peak_bytes = max(self.peak_bytes, reading.value)
        return reading.value


class WindowFigures:
    """Converter of `RunMeters.of_window`, reduced over the ranks, into figures of a row."""

    def __init__(self) -> None:
        self._before = 0.0
        self._tokens = 0

    def begin_stage(self) -> None:
        """Drops the tokens of the previous stage from the first window."""
        self._tokens = 0

    def add_tokens(self, tokens: int) -> None:
        """Adds the tokens of a finished step."""
        self._tokens += tokens

    def of_row(self, reduced: Mapping[str, float]) -> dict[str, float]:
        """Returns ``memory_bytes`` of the fullest rank, and ``energy_j`` of all since its last row.

        Figures that are not measured are left out, and so is energy while no counter has ticked.
        """
        row = {}
        if math.isfinite(reduced[_MEMORY]):
            row[_MEMORY] = reduced[_MEMORY]
        joules = reduced[_JOULES] - self._before
        if joules > 0 and self._tokens:
            row |= {"energy_j": joules, "joules_per_token": joules / self._tokens}
            self._before, self._tokens = reduced[_JOULES], 0
        return row
