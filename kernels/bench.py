"""Times the expert computation by back end: ``python -m kernels.bench --help``.

One process, rivals interleaved in random order, outputs checked against fp64 before anything is timed. It
needs torch alone (and triton for the back end of that name).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.aot import write_text
from kernels.bench_figure import Bar, bars_svg
from kernels.bench_layer import PASSES, Case, Result, measure_layer
from kernels.bench_products import GOALS, ProductResult, measure_products
from kernels.bench_shapes import ROUTINGS, SHAPES, Roof
from kernels.expert_mlp import BACKENDS

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Times the experts of a layer by back end, forward and forward+backward; on a CPU at "
        "widths divided by --divide, with the grouped product alone besides. What refuses says why.",
    )
    cuda = torch.cuda.is_available()
    many: dict[str, Any] = {"nargs": "+", "default": None}
    tokens = "tokens of a batch (default: 4096 16384 65536 on a GPU, 512 on a CPU)"
    part = (
        "layer: whole experts; products: the grouped product alone, on a CPU (default: what the device has)"
    )
    widths = "divide both widths of a shape (default: 1 on a GPU, 16 on a CPU)"
    peak = "of the GPU in the dtype, for the floor (default 790: H200, bf16)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--part", choices=["layer", "products"], **many, help=part)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, **many, help=tokens)
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+", default=list(ROUTINGS))
    parser.add_argument("--dtype", choices=list(_DTYPES), **many, help="default: bf16; fp32 too on a CPU")
    parser.add_argument("--backend", choices=list(BACKENDS), nargs="+", default=list(BACKENDS))
    parser.add_argument("--divide", type=int, default=None, help=widths)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each rival (default 11)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help=peak)
    parser.add_argument(
        "--bandwidth-tbs", type=float, default=4.3, help="TB/s of the GPU (default 4.3: H200)"
    )
    parser.add_argument("--json", metavar="PATH", default=None, help="write the figures; - for stdout")
    parser.add_argument("--figure", metavar="PATH", default=None, help="write the bars as SVG")
    arguments = parser.parse_args(argv)
    _refuse_nonsense(parser, arguments)
    return _with_defaults(arguments)


def _refuse_nonsense(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    counts = {
        "--rounds": [arguments.rounds],
        "--tokens": arguments.tokens or [],
        "--divide": [] if arguments.divide is None else [arguments.divide],
        "--threads": [] if arguments.threads is None else [arguments.threads],
        "--peak-tflops": [arguments.peak_tflops],
        "--bandwidth-tbs": [arguments.bandwidth_tbs],
    }
    wrong = [f"{name} {n}: it must be above 0" for name, ns in counts.items() for n in ns if n <= 0]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: torch sees no GPU here; choose cpu")
    if arguments.device == "cuda" and "products" in (arguments.part or []):
        wrong.append("--part products: it compares CPU paths; choose layer, or --device cpu")
    if wrong:
        parser.error("; ".join(wrong))


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    on_gpu = arguments.device == "cuda"
    arguments.part = arguments.part or (["layer"] if on_gpu else ["products", "layer"])
    arguments.tokens = arguments.tokens or ([4096, 16384, 65536] if on_gpu else [512])
    arguments.dtype = arguments.dtype or (["bf16"] if on_gpu else ["fp32", "bf16"])
    arguments.divide = arguments.divide or (1 if on_gpu else 16)
    return arguments


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        return found
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return found | {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}


def _products(rounds: int, bars: list[Bar]) -> list[dict[str, Any]]:
    print(
        f"\n{'grouped product alone':44}{'rival':12}{'GFLOP/s':>9}{'of dense':>10}{'p10':>7}{'p90':>7}  goal"
    )
    rows = []
    for shape, goal in GOALS:
        results = measure_products(shape, rounds)
        for r in results:
            aim = "" if r.rival == "dense" else f"  {goal:.2f}"
            print(
                f"{shape.label:44}{r.rival:12}{r.gflops:9.0f}{r.share.median:10.2f}{r.share.p10:7.2f}"
                f"{r.share.p90:7.2f}{aim}",
                flush=True,
            )
            bars.append(_product_bar(shape.label, r))
        rows.append({"shape": shape.label, "goal": goal, "results": [asdict(r) for r in results]})
    return rows


def _product_bar(label: str, r: ProductResult) -> Bar:
    s = r.share
    return Bar(f"{label}: rate", r.rival, s.median, s.p10, s.p90, f"{s.median:.2f} of dense")


def _cases(arguments: argparse.Namespace) -> list[Case]:
    return [
        Case(
            SHAPES[shape].divided(arguments.divide),
            T,
            routing,
            _DTYPES[dtype],
            torch.device(arguments.device),
        )
        for dtype in arguments.dtype
        for shape in arguments.shape
        for T in arguments.tokens
        for routing in arguments.routing
    ]


def _layers(arguments: argparse.Namespace, bars: list[Bar]) -> list[dict[str, Any]]:
    roof = Roof(arguments.peak_tflops * 1e12, arguments.bandwidth_tbs * 1e12)
    print(
        f"\n{'experts of a layer':40}{'pass':18}{'back end':12}{'ms':>9}{'p10':>9}{'p90':>9}{'TFLOP/s':>9}"
        f"{'floor':>7}{'saved MB':>10}{'peak MB':>9}{'error':>9}"
    )
    rows = []
    for case in _cases(arguments):
        kind = next(name for name, dtype in _DTYPES.items() if dtype == case.dtype)
        label = f"{case.shape.name} {case.tokens} {case.routing} {kind}"
        try:
            results = measure_layer(case, arguments.backend, arguments.rounds, roof)
        except torch.OutOfMemoryError:
            print(f"{label:40}the weights alone do not fit into this GPU", flush=True)
            rows.append({"case": label, "why_not": "out of memory"})
            continue
        for r in results:
            print(f"{label:40}{r.passes:18}{_line(r)}", flush=True)
            if r.seconds is not None:
                s = r.seconds
                group = f"{label}, {r.passes}"
                bars.append(Bar(group, r.backend, s.median, s.p10, s.p90, f"{1e3 * s.median:.2f} ms"))
        rows.append({"case": label, "results": [asdict(r) for r in results]})
    return rows


def _line(r: Result) -> str:
    name = f"{r.backend}{'*' if r.is_auto else ''}"
    if r.seconds is None:
        return f"{name:12}not run: {r.why_not}"
    s = r.seconds
    floor = "" if r.floor_share is None else f"{100 * r.floor_share:.0f}%"
    saved, peak = ("" if n is None else f"{n / 1e6:.1f}" for n in (r.saved_bytes, r.peak_bytes))
    return (
        f"{name:12}{1e3 * s.median:9.2f}{1e3 * s.p10:9.2f}{1e3 * s.p90:9.2f}{r.tflops:9.3f}"
        f"{floor:>7}{saved:>10}{peak:>9}{r.error:9.1e}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, writes what was asked for."""
    arguments = _parse(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {"machine": machine(arguments.device), "rounds": arguments.rounds}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    bars: list[Bar] = []
    if "products" in arguments.part:
        figures["products"] = _products(arguments.rounds, bars)
    if "layer" in arguments.part:
        figures["layers"] = _layers(arguments, bars)
        print(f"* is what auto picks; passes are {' and '.join(PASSES)}")
    text = json.dumps(figures, indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json is not None:
        write_text(Path(arguments.json), text)
    if arguments.figure is not None:
        write_text(Path(arguments.figure), bars_svg("Experts by back end", bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
