"""Tables of the benchmark: printed line by line, and kept for JSON and figures.

Letters: T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from kernels.bench.bench_case import Case
from kernels.bench.bench_device import clocks
from kernels.bench.bench_figure import Bar
from kernels.bench.bench_layer import BASE, PASSES, Result, measure_decode, measure_layer
from kernels.bench.bench_products import GOALS, ProductResult, measure_products
from kernels.bench.bench_shapes import Roof
from kernels.third_party import THIRD_PARTY

_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LEGEND = (
    "* marks the choice of auto, < the fastest, << the fastest if it is a third party's; back ends that do "
    "not run are listed once, with the first case"
)


def products_table(rounds: int, bars: list[Bar]) -> list[dict[str, Any]]:
    """Measures the grouped product alone against the dense one; prints a table, returns its rows."""
    print(f"\n{'grouped product alone':44}{'by':12}{'GFLOP/s':>9}{'of dense':>10}{'p10':>7}{'p90':>7}  goal")
    rows = []
    for shape, goal in GOALS:
        results = measure_products(shape, rounds)
        for r in results:
            aim = "" if r.name == "dense" else f"  {goal:.2f}"
            print(
                f"{shape.label:44}{r.name:12}{r.gflops:9.0f}{r.share.median:10.2f}{r.share.p10:7.2f}"
                f"{r.share.p90:7.2f}{aim}",
                flush=True,
            )
            bars.append(_product_bar(shape.label, r))
        rows.append({"shape": shape.label, "goal": goal, "results": [asdict(r) for r in results]})
    return rows


def _product_bar(label: str, r: ProductResult) -> Bar:
    s = r.share
    return Bar(f"{label}: rate", r.name, s.median, s.p10, s.p90, f"{s.median:.2f} of dense")


class _Table:
    """Table that prints a line for each result, and keeps figures, bars and who was the fastest."""

    def __init__(self, bars: list[Bar], line: Callable[[Any], str], group: Callable[[Any], str]) -> None:
        """Starts an empty table.

        Args:
            bars: List that bars are added to.
            line: Formats a result, after its case.
            group: Names the group of bars of a result, after its case.
        """
        self.rows: list[dict[str, Any]] = []
        self.first: list[str] = []
        self._bars, self._line, self._group = bars, line, group
        self._printed: set[tuple[str, str]] = set()

    def add(self, case: Case, label: str, measure: Callable[[], Sequence[Result]]) -> None:
        """Measures a case and prints its results."""
        try:
            results = measure()
        except torch.OutOfMemoryError:
            print(f"{label:40}the weights alone do not fit into this GPU", flush=True)
            self.rows.append({"case": label, "why_not": "out of memory"})
            return
        for r in results:
            if self._is_news(r):
                print(f"{label:40}{self._line(r)}", flush=True)
            if r.seconds is not None:
                s, group = r.seconds, f"{label}, {self._group(r)}"
                self._bars.append(Bar(group, r.backend, s.median, s.p10, s.p90, _duration(s.median)))
        self.first += [r.backend for r in results if r.is_fastest]
        found = [asdict(r) for r in results]
        self.rows.append({"case": label, "results": found, "clocks": clocks(case.device)})

    def _is_news(self, r: Result) -> bool:
        """Returns False for a back end that did not run for the same reason in an earlier case."""
        is_new = r.seconds is not None or (r.backend, r.why_not) not in self._printed
        self._printed.add((r.backend, r.why_not))
        return is_new


def layers_table(
    cases: Sequence[Case], names: Sequence[str], rounds: int, roof: Roof, bars: list[Bar]
) -> list[dict[str, Any]]:
    """Measures whole experts by case, pass and back end; prints a table, returns its rows."""
    print(
        f"\n{'experts of a layer':40}{'pass':18}{'back end':15}{'ms':>9}{'p10':>9}{'p90':>9}{'TFLOP/s':>9}"
        f"{'floor':>7}{'saved MB':>10}{'peak MB':>9}{'error':>9}"
    )
    table = _Table(bars, lambda r: f"{r.passes:18}{_line(r)}", lambda r: r.passes)
    for case in cases:
        label = f"{case.shape.name} {case.tokens} {case.routing} {_KINDS[case.dtype]}"
        table.add(case, label, partial(measure_layer, case, names, rounds, roof))
    print(f"{_LEGEND}; passes are {' and '.join(PASSES)}\n{_wins(table.first)}")
    return table.rows


def decode_table(
    cases: Sequence[Case],
    tokens: Sequence[int],
    names: Sequence[str],
    rounds: int,
    roof: Roof,
    bars: list[Bar],
) -> list[dict[str, Any]]:
    """Measures a few tokens by case and back end; prints a table, returns its rows."""
    print(
        f"\n{'experts of a layer, a few tokens':40}{'tokens':>7} {'back end':15}{'us':>9}{'p10':>9}{'p90':>9}"
        f"{f'x {BASE}':>9}{'p10':>7}{'p90':>7}{'of bandwidth':>14}{'error':>9}"
    )
    table = _Table(bars, lambda r: f"{r.tokens:7} {_decode_line(r)}", lambda r: f"{r.tokens} tokens, forward")
    for case in cases:
        label = f"{case.shape.name} {case.routing} {_KINDS[case.dtype]}"
        table.add(case, label, partial(measure_decode, case, tokens, names, rounds, roof))
    print(f"{_LEGEND}; x {BASE} is the plain loop's time over the back end's\n{_wins(table.first)}")
    return table.rows


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def _name(backend: str, *, is_auto: bool, is_fastest: bool) -> str:
    mark = ("<<" if backend in THIRD_PARTY else "<") if is_fastest else ""
    return f"{backend}{'*' if is_auto else ''} {mark}"


def _wins(first: Iterable[str]) -> str:
    counted = Counter(first)
    if not counted:
        return "fastest: none, as nothing ran"
    return "fastest: " + ", ".join(f"{name} {n} of {counted.total()}" for name, n in counted.most_common())


def _line(r: Result) -> str:
    name = _name(r.backend, is_auto=r.is_auto, is_fastest=r.is_fastest)
    if r.seconds is None:
        return f"{name:15}not run: {r.why_not}"
    s = r.seconds
    floor = "" if r.floor_share is None else f"{100 * r.floor_share:.0f}%"
    saved, peak = ("" if n is None else f"{n / 1e6:.1f}" for n in (r.saved_bytes, r.peak_bytes))
    return (
        f"{name:15}{1e3 * s.median:9.2f}{1e3 * s.p10:9.2f}{1e3 * s.p90:9.2f}{r.tflops:9.3f}"
        f"{floor:>7}{saved:>10}{peak:>9}{r.error:9.1e}"
    )


def _decode_line(r: Result) -> str:
    name = _name(r.backend, is_auto=r.is_auto, is_fastest=r.is_fastest)
    if r.seconds is None:
        return f"{name:15}not run: {r.why_not}"
    s, loop = r.seconds, r.over_loop
    times = "" if loop is None else f"{loop.median:9.2f}{loop.p10:7.2f}{loop.p90:7.2f}"
    share = "" if r.bandwidth_share is None else f"{100 * r.bandwidth_share:.0f}%"
    micro = "".join(f" {1e6 * value:8.1f}" for value in (s.median, s.p10, s.p90))
    return f"{name:15}{micro}{times:23}{share:>14}{r.error:9.1e}"
