"""Times the experts of a layer for a few tokens, as generation has them: all of it is reading weights.

On a GPU against the time that reading the chosen experts takes, on a CPU against the plain loop.
Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kernels.bench.bench_case import Case, Layer, make_layer
from kernels.bench.bench_layer import fastest_of, runner, stopwatch, unsupported_reasons, usable
from kernels.bench.bench_shapes import H200, Roof
from kernels.bench.timing import Timing, interleave, median_ratio, summarise
from kernels.expert_mlp import choose_backend

#: What all are compared with on a CPU.
BASE = "loop"


@dataclass(frozen=True)
class DecodeResult:
    """What was measured of one back end for one number of tokens.

    Attributes:
        backend: Its name.
        tokens: T.
        is_auto: Whether ``auto`` picks it here.
        is_fastest: Whether no other has a smaller median.
        seconds: Median and spread; None when it was not timed.
        over_loop: The plain loop's time over its own, round by round; above 1 it is faster.
        bandwidth_share: The least time that reading takes over its own; None on a CPU.
        error: Of the output against fp64, relative; None when it did not run.
        why_not: Why it was not timed, or an empty string.
    """

    backend: str
    tokens: int
    is_auto: bool
    is_fastest: bool = False
    seconds: Timing | None = None
    over_loop: Timing | None = None
    bandwidth_share: float | None = None
    error: float | None = None
    why_not: str = ""


def least_bytes(layer: Layer, tokens: int) -> int:
    """What has to be read and written: the experts that these tokens chose, the tokens, and the output."""
    s = layer.case.shape
    chosen = int(layer.ids_TK[:tokens].unique().numel())
    elements = 3 * chosen * s.width * s.expert_width + 2 * tokens * s.width
    return elements * layer.case.dtype.itemsize


def measure_decode(
    case: Case, tokens: Sequence[int], names: Sequence[str], rounds: int, roof: Roof = H200
) -> list[DecodeResult]:
    """Every back end for every number of tokens: checked, then timed, forward alone and without gradients.

    Args:
        case: What runs; its own number of tokens is not used.
        tokens: The numbers of tokens.
        names: Keys of `kernels.expert_mlp.BACKENDS`; the plain loop runs besides.
        rounds: Timed rounds of each.
        roof: Of the GPU, for the share of its bandwidth.
    """
    names = list(dict.fromkeys([*names, BASE]))
    whole = make_layer(replace(case, tokens=max(tokens)))
    work, refused = unsupported_reasons(case, names)
    # The largest batch first, for those that tune themselves on what they see first.
    _, refused = usable(whole, names, refused, backward=False)
    results = []
    for T in tokens:
        layer = whole.first(T)
        auto = choose_backend(work.with_rows(layer.plan(T))).backend.name
        errors, why_not = usable(layer, names, refused, backward=False)
        runners = {name: runner(layer, layer.plan(T), name, backward=False) for name in errors}
        seconds = interleave(runners, rounds, measure=stopwatch(case.device))
        best = fastest_of(seconds)
        least = least_bytes(layer, T) / roof.bandwidth
        for name in names:
            if name not in errors:
                results.append(DecodeResult(name, T, name == auto, why_not=why_not[name] or ""))
                continue
            timing = summarise(seconds[name])
            results.append(
                DecodeResult(
                    name,
                    T,
                    name == auto,
                    name == best,
                    timing,
                    median_ratio(seconds[BASE], seconds[name]) if BASE in seconds else None,
                    least / timing.median if case.device.type == "cuda" else None,
                    errors[name],
                )
            )
    return results
