"""Times the experts of a layer by back end: checked against fp64 first, then interleaved in one process.

For the few tokens of generation, where nearly all time is spent reading weights, a back end is compared with
the time that reading the chosen experts takes on a GPU, and with the plain loop.

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
from kernels.bench.timing import Timing, interleave, median_ratio, summarise
from kernels.expert_mlp import BACKENDS, choose_backend, expert_mlp
from kernels.plan.row_plan import RowPlan

PASSES = ("forward", "forward+backward")
#: Back end that others are compared with for a few tokens.
BASE = "loop"


@dataclass(frozen=True)
class Result:
    """Measurement of one back end in one case and pass.

    Attributes:
        backend: Its name.
        tokens: T.
        is_auto: Whether ``auto`` picks it here.
        passes: A member of `PASSES`.
        is_fastest: Whether no other has a smaller median in this case and pass.
        seconds: Median and spread; None when it was not timed.
        error: Relative error of the output against fp64 in the L2 norm; None when it did not run.
        tflops: 6 or 18 T K D F operations over the time, in 1e12 per second.
        floor_share: Least time of the roof over the measured time; None on a CPU.
        saved_bytes: Bytes that one forward pass keeps for backward, besides x and the weights.
        peak_bytes: Peak of allocated bytes beyond the tensors of the case; None on a CPU.
        over_loop: Time of the plain loop over its own, round by round, for a few tokens.
        bandwidth_share: Least time of reading over the measured time, for a few tokens; None on a CPU.
        why_not: Why it was not timed, or an empty string.
    """

    backend: str
    tokens: int
    is_auto: bool
    passes: str
    is_fastest: bool = False
    seconds: Timing | None = None
    error: float | None = None
    tflops: float | None = None
    floor_share: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    over_loop: Timing | None = None
    bandwidth_share: float | None = None
    why_not: str = ""


def measure_layer(
    case: Case, names: Sequence[str], rounds: int, roof: Roof = H200, passes: Sequence[str] = PASSES
) -> list[Result]:
    """Checks and times every back end in one case.

    Args:
        case: Layer, tokens, dtype and device.
        names: Keys of `kernels.expert_mlp.BACKENDS`.
        rounds: Timed rounds of each.
        roof: Limits of the GPU, for the share of the least time.
        passes: Members of `PASSES`.

    Returns:
        A result for each pass and back end; those that were not timed carry the reason.
    """
    layer = make_layer(case)
    plan = layer.plan(case.tokens)
    refused = _unsupported_reasons(case, names)
    errors, why_not = _usable(layer, names, refused, backward=any(which != "forward" for which in passes))
    results = []
    for which in passes:
        backward = which != "forward"
        found, _ = _compare(layer, names, errors, why_not, rounds, which)
        s = case.shape
        operations = (18 if backward else 6) * case.tokens * s.slots * s.width * s.expert_width
        floor = floor_seconds(s, case.tokens, roof, backward=backward)
        for result in found:
            if (timing := result.seconds) is None:
                results.append(result)
                continue
            name = result.backend
            run = _runner(layer, plan, name, backward=backward)
            figures = replace(
                result,
                tflops=operations / timing.median / 1e12,
                floor_share=floor / timing.median if case.device.type == "cuda" else None,
                saved_bytes=_saved_bytes(layer, plan, name) if backward else None,
                peak_bytes=_peak_bytes(case.device, run),
            )
            results.append(figures)
    return results


def measure_decode(
    case: Case, tokens: Sequence[int], names: Sequence[str], rounds: int, roof: Roof = H200
) -> list[Result]:
    """Checks and times every back end for each number of tokens, forward only and without gradients.

    Args:
        case: Layer, dtype and device; its own number of tokens is not used.
        tokens: Numbers of tokens.
        names: Keys of `kernels.expert_mlp.BACKENDS`; the plain loop runs as well.
        rounds: Timed rounds of each.
        roof: Limits of the GPU, for the share of its bandwidth.
    """
    names = list(dict.fromkeys([*names, BASE]))
    whole = make_layer(replace(case, tokens=max(tokens)))
    # The largest batch first, for libraries that tune themselves on the first batch.
    _, refused = _usable(whole, names, _unsupported_reasons(case, names), backward=False)
    results = []
    for T in tokens:
        layer = whole.first(T)
        errors, why_not = _usable(layer, names, refused, backward=False)
        found, seconds = _compare(layer, names, errors, why_not, rounds, "forward")
        least = least_bytes(layer, T) / roof.bandwidth
        for result in found:
            if (timing := result.seconds) is None:
                results.append(result)
                continue
            loop = median_ratio(seconds[BASE], seconds[result.backend]) if BASE in seconds else None
            share = least / timing.median if case.device.type == "cuda" else None
            results.append(replace(result, over_loop=loop, bandwidth_share=share))
    return results


def least_bytes(layer: Layer, tokens: int) -> int:
    """Returns the bytes that must be moved: the experts these tokens chose, the tokens, and the output."""
    s = layer.case.shape
    chosen = int(layer.ids_TK[:tokens].unique().numel())
    elements = 3 * chosen * s.width * s.expert_width + 2 * tokens * s.width
    return elements * layer.case.dtype.itemsize


def _compare(
    layer: Layer,
    names: Sequence[str],
    errors: Mapping[str, float],
    why_not: Mapping[str, str | None],
    rounds: int,
    passes: str,
) -> tuple[list[Result], dict[str, list[float]]]:
    """Times the back ends that have an error, and returns a result for each name and the seconds."""
    case, plan = layer.case, layer.plan(layer.case.tokens)
    auto = choose_backend(_workload(case).with_rows(plan)).backend.name
    runners = {name: _runner(layer, plan, name, backward=passes != "forward") for name in errors}
    # A GPU times itself with a cold cache, a CPU by the host's clock.
    measure = ColdTimer(case.device) if case.device.type == "cuda" else None
    seconds = interleave(runners, rounds, measure=measure)
    timings = {name: summarise(values) for name, values in seconds.items()}
    best = min(timings, key=lambda name: timings[name].median, default=None)
    results = []
    for name in names:
        result = Result(name, case.tokens, name == auto, passes)
        if name in timings:
            ran = {"seconds": timings[name], "error": errors[name], "is_fastest": name == best}
            results.append(replace(result, **ran))  # type: ignore[arg-type]
        else:
            results.append(replace(result, why_not=why_not[name] or ""))
    return results, seconds


def _workload(case: Case) -> Workload:
    s = case.shape
    return Workload(case.device, case.dtype, s.experts, s.width, s.expert_width, "silu", False)


def _unsupported_reasons(case: Case, names: Sequence[str]) -> dict[str, str | None]:
    return {name: BACKENDS[name].unsupported_reason(_workload(case)) for name in names}


def _usable(
    layer: Layer, names: Sequence[str], refused: Mapping[str, str | None], *, backward: bool
) -> tuple[dict[str, float], dict[str, str | None]]:
    """Returns the error of each back end that runs and computes correctly, and why the others do not."""
    why_not = dict(refused)
    errors: dict[str, float] = {}
    plan = layer.plan(layer.case.tokens)
    for name in names:
        if why_not[name] is None:
            try:
                # The whole case first: some libraries tune themselves for good on the first batch they see.
                _runner(layer, plan, name, backward=backward)()
                errors[name] = checked_error(layer, name, backward=backward)
            # Compilers of other libraries fail in ways of their own.
            except Exception as failure:
                why_not[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return errors, why_not


def _runner(layer: Layer, plan: RowPlan, name: str, *, backward: bool) -> Callable[[], object]:
    """Returns one forward pass, or forward and backward, as a call."""
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
