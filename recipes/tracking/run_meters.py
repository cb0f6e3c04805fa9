"""Memory and energy of a run in progress, read every few steps and in between never.

What the steps used is in the rows; the total, with all that lies between them, is known at the end.
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
        reasons: Why a figure is not measured, by its name.
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
            device: Of this rank.
            first_on_machine: A CPU's counters are of the machine: one of its ranks reads them for all.
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
        """What the steps since the last call have used, to be reduced over the ranks; see `WindowFigures`."""
        peak = self._take_peak()
        self._steps_j += self._lap()
        joules = math.nan if self._reads_energy and self._energy is None else self._steps_j
        return {_MEMORY: Metric(math.nan if peak is None else peak, "max"), _JOULES: Metric(joules, "sum")}

    def between(self) -> None:
        """Something else than steps has ended: what it used is not theirs."""
        self._take_peak()
        self._other_j += self._lap()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """For work whose memory is not the run's: a measurement of the machine."""
        self._take_peak()
        yield
        self._memory.start()

    def total_joules(self) -> float:
        """Everything since the meters began; NaN where it is not measured, 0 of ranks that read nothing."""
        self.between()
        joules = self._steps_j + self._other_j
        return math.nan if self._reads_energy and not joules > 0 else joules

    def _lap(self) -> float:
        """Joules since the last; a counter that has not ticked goes on, and its joules come with the next."""
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
        """A counter that cannot be read any more is given up, with the reason; training goes on."""
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
    """Turns what `RunMeters.of_window` gave, reduced over the ranks, into figures of a row."""

    def __init__(self) -> None:
        self._before = 0.0
        self._tokens = 0

    def begin_stage(self) -> None:
        """Tokens of the leg before are not of this one's first window."""
        self._tokens = 0

    def add_tokens(self, tokens: int) -> None:
        """A step is done."""
        self._tokens += tokens

    def of_row(self, reduced: Mapping[str, float]) -> dict[str, float]:
        """``memory_bytes`` of the fullest rank, ``energy_j`` of all since the row that had it last.

        What is not measured is left out, and so is energy while no counter has ticked.
        """
        row = {}
        if math.isfinite(reduced[_MEMORY]):
            row[_MEMORY] = reduced[_MEMORY]
        joules = reduced[_JOULES] - self._before
        if joules > 0 and self._tokens:
            row |= {"energy_j": joules, "joules_per_token": joules / self._tokens}
            self._before, self._tokens = reduced[_JOULES], 0
        return row
