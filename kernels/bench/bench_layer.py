"""Times the experts of a layer by back end: checked against fp64 first, then interleaved in one process.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import Workload
from kernels.bench.bench_case import Case, Layer, make_layer
from kernels.bench.bench_check import checked_error
from kernels.bench.bench_device import ColdTimer
from kernels.bench.bench_shapes import H200, Roof, floor_seconds
from kernels.bench.timing import Timing, interleave, summarise
from kernels.expert_mlp import BACKENDS, choose_backend, expert_mlp
from kernels.plan.row_plan import RowPlan

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Result:
    """What was measured of one back end in one case and pass.

    Attributes:
        backend: Its name.
        is_auto: Whether ``auto`` picks it here.
        passes: ``forward`` or ``forward+backward``.
        is_fastest: Whether no other has a smaller median in this case and pass.
        seconds: Median and spread; None when it was not timed.
        error: Of the output against fp64, relative, in the L2 norm; None when it did not run.
        tflops: Per second, by 6 or 18 T K D F operations.
        floor_share: Least time of the roof over the time measured; None on a CPU.
        saved_bytes: What one forward pass keeps for backward, besides x and the weights.
        peak_bytes: Allocated at most beyond what the case holds; None on a CPU.
        why_not: Why it was not timed, or an empty string.
    """

    backend: str
    is_auto: bool
    passes: str
    is_fastest: bool = False
    seconds: Timing | None = None
    error: float | None = None
    tflops: float | None = None
    floor_share: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    why_not: str = ""


def runner(layer: Layer, plan: RowPlan, name: str, *, backward: bool) -> Callable[[], object]:
    """What is timed: one forward pass, or both."""
    backend = BACKENDS[name]

    @torch.no_grad()
    def forward() -> object:
        return expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, backend)

    def both() -> object:
        out_TD = expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, backend)
        return torch.autograd.grad(out_TD, layer.leaves, layer.grad_TD)

    return both if backward else forward


def _saved_bytes(layer: Layer, plan: RowPlan, name: str) -> int:
    index = [value for value in vars(plan).values() if isinstance(value, Tensor)]
    held = {value.untyped_storage().data_ptr() for value in (*layer.leaves, *index)}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out_TD = expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, BACKENDS[name])
    del out_TD
    return sum(kept.values())


def _peak_bytes(device: torch.device, run: Callable[[], object]) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def unsupported_reasons(case: Case, names: Sequence[str]) -> tuple[Workload, dict[str, str | None]]:
    """What back ends are chosen by, and why each refuses it."""
    s = case.shape
    work = Workload(case.device, case.dtype, s.experts, s.width, s.expert_width, "silu", False)
    return work, {name: BACKENDS[name].unsupported_reason(work) for name in names}


def measure_layer(
    case: Case, names: Sequence[str], rounds: int, roof: Roof = H200, passes: Sequence[str] = PASSES
) -> list[Result]:
    """Every back end in one case: checked, then timed, those that refuse with their reason.

    Args:
        case: What runs.
        names: Keys of `kernels.expert_mlp.BACKENDS`.
        rounds: Timed rounds of each.
        roof: Of the GPU, for the share of the least time.
        passes: Some of `PASSES`.
    """
    work, refused = unsupported_reasons(case, names)
    layer = make_layer(case)
    plan = layer.plan(case.tokens)
    auto = choose_backend(work.with_rows(plan)).backend.name
    backward = any(which != "forward" for which in passes)
    errors, why_not = usable(layer, names, refused, backward=backward)
    results = []
    for which in passes:
        runners = {n: runner(layer, plan, n, backward=which != "forward") for n in errors}
        seconds = interleave(runners, rounds, measure=stopwatch(case.device))
        best = fastest_of(seconds)
        for name in names:
            if name not in errors:
                results.append(Result(name, name == auto, which, why_not=why_not[name] or ""))
                continue
            timing = summarise(seconds[name])
            found = _result(layer, plan, name, which, timing, errors[name], runners[name], roof)
            results.append(replace(found, is_auto=name == auto, is_fastest=name == best))
    return results


def usable(
    layer: Layer, names: Sequence[str], refused: Mapping[str, str | None], *, backward: bool
) -> tuple[dict[str, float], dict[str, str | None]]:
    """The error of each back end that runs and computes the right thing, and why the others do not.

    Args:
        layer: What runs.
        names: The back ends.
        refused: Why each refuses, or None.
        backward: Whether gradients are checked, and the whole case is tried with them.
    """
    why_not = dict(refused)
    errors: dict[str, float] = {}
    plan = layer.plan(layer.case.tokens)
    for name in names:
        if why_not[name] is None:
            try:
                # The whole case first: some libraries tune themselves on the first batch they see, for good.
                runner(layer, plan, name, backward=backward)()
                errors[name] = checked_error(layer, name, backward=backward)
            # Compilers of other libraries fail in ways of their own.
            except Exception as failure:
                why_not[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return errors, why_not


def fastest_of(seconds: Mapping[str, list[float]]) -> str | None:
    """Whose median is the smallest; None where nobody ran."""
    return min(seconds, key=lambda name: summarise(seconds[name]).median, default=None)


def _result(
    layer: Layer,
    plan: RowPlan,
    name: str,
    which: str,
    timing: Timing,
    error: float,
    run: Callable[[], object],
    roof: Roof,
) -> Result:
    case = layer.case
    s, backward = case.shape, which != "forward"
    operations = (18 if backward else 6) * case.tokens * s.slots * s.width * s.expert_width
    floor = floor_seconds(s, case.tokens, roof, backward=backward)
    return Result(
        backend=name,
        is_auto=False,
        passes=which,
        seconds=timing,
        error=error,
        tflops=operations / timing.median / 1e12,
        floor_share=floor / timing.median if case.device.type == "cuda" else None,
        saved_bytes=_saved_bytes(layer, plan, name) if backward else None,
        peak_bytes=_peak_bytes(case.device, run),
    )


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float] | None:
    """How a run is timed: by the GPU, with a cold cache; on a CPU by the host's clock."""
    return ColdTimer(device) if device.type == "cuda" else None
