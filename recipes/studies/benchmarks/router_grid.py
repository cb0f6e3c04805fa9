"""Time and memory of every router over a grid of tokens and experts.

The routers of a shape run interleaved in one process. Cases that would take more memory or time than allowed
are not run, and are reported with the estimate that excluded them.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from kernels.bench.timing import Timing, interleave, median_ratio, summarise
from recipes.studies.benchmarks.live_bytes import peak_bytes
from recipes.studies.benchmarks.router_candidates import Candidate, Pass, Shape
from recipes.tracking.measure_peaks import synchronise

# Most tokens of the first estimate of a router.
_FIRST_LOOK = 1024
# Fewer rounds make no median; a router without time for them and a warm-up is skipped.
_FEWEST_ROUNDS = 3
_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of time and memory at one shape.

    Attributes:
        rounds: Timed passes, at most.
        seconds: Seconds of all its passes; fewer rounds are timed where a pass is slow.
        num_bytes: Peak memory of a pass.
    """

    rounds: int
    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class Cell:
    """One router at one shape.

    Attributes:
        router: Its label.
        tokens: T.
        experts: E.
        left_out: Reason to skip it: ``skipped: estimated ...`` or ``refused: ...``; else None.
        seconds: Seconds of a forward and backward pass.
        ratio: To the baseline, round by round.
        peak_bytes: Peak bytes of a pass, with gradients but without tokens and parameters.
        notes: The router's own figures: slots per token, iterations, experts in use.
    """

    router: str
    tokens: int
    experts: int
    left_out: str | None = None
    seconds: Timing | None = None
    ratio: Timing | None = None
    peak_bytes: int | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Look:
    """Cost at some number of tokens, measured or estimated."""

    tokens: int
    seconds: float
    num_bytes: float

    def at(self, tokens: int) -> _Look:
        """Scales the cost in proportion to the tokens."""
        factor = tokens / self.tokens
        return _Look(tokens, self.seconds * factor, self.num_bytes * factor)


class Grid:
    """Measures shape by shape, fewest tokens first, so that each shape predicts the cost of the next."""

    def __init__(self, candidates: Sequence[Candidate], limits: Limits, device: torch.device) -> None:
        self.candidates = candidates
        self.limits = limits
        self.device = device
        self._looks: dict[tuple[str, int], _Look] = {}

    @property
    def baseline(self) -> str:
        """Label of the baseline of all ratios: plain top-k, else the first."""
        labels = [candidate.label for candidate in self.candidates]
        return "topk" if "topk" in labels else labels[0]

    def measure(self, shape: Shape) -> list[Cell]:
        """Measures all routers at a shape, in their order."""
        cells: dict[str, Cell] = {}
        passes: dict[str, Pass] = {}
        for candidate in self.candidates:
            reason = self._left_out(candidate, shape)
            if reason is None:
                passes[candidate.label] = candidate.prepare(shape, self.device)
            else:
                cells[candidate.label] = Cell(candidate.label, shape.tokens, shape.experts, reason)
        seconds = self._time(passes, shape)
        for label, values in seconds.items():
            cells[label] = self._cell(label, shape, values, seconds, passes[label])
        return [cells[candidate.label] for candidate in self.candidates]

    def _left_out(self, candidate: Candidate, shape: Shape) -> str | None:
        """Returns the reason to skip a shape, else None; an unknown router is first timed at fewer tokens."""
        unsupported_reason = candidate.unsupported_reason(shape.experts)
        if unsupported_reason is not None:
            return f"refused: {unsupported_reason}."
        key, limits = (candidate.label, shape.experts), self.limits
        if key not in self._looks:
            small = dataclasses.replace(shape, tokens=min(shape.tokens, _FIRST_LOOK))
            self._looks[key] = self._look(candidate.prepare(small, self.device), small.tokens)
        look = self._looks[key] = self._looks[key].at(shape.tokens)
        if look.num_bytes > limits.num_bytes:
            needed, allowed = look.num_bytes / _MIB, limits.num_bytes / _MIB
            return f"skipped: estimated {needed:,.0f} MiB, and {allowed:,.0f} MiB are allowed."
        if (needed := look.seconds * (_FEWEST_ROUNDS + 1)) > limits.seconds:
            allowed = f"{limits.seconds:g} s are allowed."
            return f"skipped: estimated {needed:.1f} s for {_FEWEST_ROUNDS} rounds, and {allowed}"
        return None

    def _look(self, once: Pass, tokens: int) -> _Look:
        once.run()
        started = time.perf_counter()
        dict(once.run())
        synchronise(self.device)
        seconds = time.perf_counter() - started
        return _Look(tokens, seconds, peak_bytes(once.run, once.known, self.device))

    def _time(self, passes: Mapping[str, Pass], shape: Shape) -> dict[str, list[float]]:
        """Returns the seconds of each round; slow routers take part in fewer rounds."""
        wanted = {
            label: int(self.limits.seconds / max(self._looks[label, shape.experts].seconds, 1e-9)) - 1
            for label in passes
        }
        rounds = {label: min(max(n, _FEWEST_ROUNDS), self.limits.rounds) for label, n in wanted.items()}
        seconds: dict[str, list[float]] = {label: [] for label in passes}
        for number in range(max(rounds.values(), default=0)):
            left = {label: passes[label].run for label in passes if rounds[label] > number}
            warmup, wait = 1 if number == 0 else 0, partial(synchronise, self.device)
            found = interleave(left, 1, warmup=warmup, synchronise=wait, seed=number)
            for label, values in found.items():
                seconds[label] += values
        return seconds

    def _cell(
        self, label: str, shape: Shape, values: list[float], seconds: Mapping[str, list[float]], once: Pass
    ) -> Cell:
        timing = summarise(values)
        needed = peak_bytes(once.run, once.known, self.device)
        self._looks[label, shape.experts] = _Look(shape.tokens, timing.median, needed)
        base = seconds.get(self.baseline)
        both = min(len(values), len(base)) if base is not None else 0
        ratio = median_ratio(values[:both], base[:both]) if base is not None else None
        notes = dict(once.run())
        return Cell(label, shape.tokens, shape.experts, None, timing, ratio, needed, notes)


def memory_allowance(device: torch.device) -> float:
    """Returns half of the free memory in bytes, the default limit of a pass."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    import psutil

    return psutil.virtual_memory().available / 2


def render(cells: Sequence[Cell], baseline: str) -> str:
    """Formats one shape as a table."""
    first = cells[0]
    width = max(len(cell.router) for cell in cells)
    head = f"  {'':{width}}{'ms':>9}{'p10':>9}{'p90':>9}{'x':>8}{'MiB':>9}  notes"
    lines = [f"T={first.tokens} E={first.experts}, x: ratio to {baseline}", head]
    for cell in cells:
        if cell.seconds is None or cell.peak_bytes is None:
            lines.append(f"  {cell.router:{width}}  {cell.left_out}")
            continue
        times = "".join(f"{1e3 * t:9.2f}" for t in (cell.seconds.median, cell.seconds.p10, cell.seconds.p90))
        ratio = "" if cell.ratio is None else f"{cell.ratio.median:.2f}"
        notes = ", ".join(f"{name} {value:.3g}" for name, value in cell.notes.items())
        lines.append(f"  {cell.router:{width}}{times}{ratio:>8}{cell.peak_bytes / _MIB:9.1f}  {notes}")
    return "\n".join(lines)
