"""Times the expert computation by back end: ``python -m kernels.bench --help``.

All back ends run interleaved in random order in one process, after outputs and gradients were checked against
fp64. It needs only torch (and triton for the back end of that name); third-party back ends take part where
their libraries are installed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.bench.bench_case import Case
from kernels.bench.bench_device import clocks
from kernels.bench.bench_figure import Bar, bars_svg
from kernels.bench.bench_shapes import ROUTINGS, SHAPES, Roof
from kernels.bench.bench_table import decode_table, layers_table, products_table
from kernels.expert_mlp import BACKENDS
from kernels.text_file import write_text
from kernels.third_party import THIRD_PARTY

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Times the experts of a layer by back end, forward and forward+backward, and for a few "
        "tokens as generation has them; on a CPU at widths divided by --divide, with the grouped product "
        "alone as well. Back ends that cannot run say why; the fastest is marked.",
    )
    cuda = torch.cuda.is_available()
    many: dict[str, Any] = {"nargs": "+", "default": None}
    tokens = "tokens of a batch (default: 4096 16384 65536 on a GPU, 512 on a CPU)"
    part = (
        "layer: whole experts; decode: the same for a few tokens, forward alone; products: the grouped "
        "product alone, on a CPU (default: all that the device has)"
    )
    routing = "default: all three, and balanced for decode"
    few = "tokens of the part decode (default: 1 2 4 8 16 32 64)"
    backends = "our own, and third parties' where they are installed (default: all)"
    widths = "divide both widths of a shape (default: 1 on a GPU, 16 on a CPU)"
    peak = "of the GPU in the dtype, for the floor (default 790: H200, bf16)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--part", choices=["layer", "decode", "products"], **many, help=part)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, **many, help=tokens)
    parser.add_argument("--decode-tokens", type=int, **many, help=few)
    parser.add_argument("--routing", choices=ROUTINGS, **many, help=routing)
    parser.add_argument("--dtype", choices=list(_DTYPES), **many, help="default: bf16; fp32 too on a CPU")
    parser.add_argument("--backend", choices=list(BACKENDS), nargs="+", default=list(BACKENDS), help=backends)
    parser.add_argument("--divide", type=int, default=None, help=widths)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each back end (default 11)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help=peak)
    parser.add_argument(
        "--bandwidth-tbs", type=float, default=4.3, help="TB/s of the GPU (default 4.3: H200)"
    )
    parser.add_argument("--json", metavar="PATH", default=None, help="write the figures; - for stdout")
    parser.add_argument("--figure", metavar="PATH", default=None, help="write the bars as SVG")
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    return _with_defaults(arguments)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    counts = {
        "--rounds": [arguments.rounds],
        "--tokens": arguments.tokens or [],
        "--decode-tokens": arguments.decode_tokens or [],
        "--divide": [] if arguments.divide is None else [arguments.divide],
        "--threads": [] if arguments.threads is None else [arguments.threads],
        "--peak-tflops": [arguments.peak_tflops],
        "--bandwidth-tbs": [arguments.bandwidth_tbs],
    }
    wrong = [f"{name} {n}: it must be above 0" for name, ns in counts.items() for n in ns if n <= 0]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: torch sees no GPU here; choose cpu")
    if arguments.device == "cuda" and "products" in (arguments.part or []):
        wrong.append("--part products: it compares CPU paths; choose layer or decode, or --device cpu")
    if wrong:
        parser.error("; ".join(wrong))


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    on_gpu = arguments.device == "cuda"
    arguments.part = arguments.part or (["layer", "decode"] if on_gpu else ["products", "layer", "decode"])
    arguments.decode_tokens = arguments.decode_tokens or [1, 2, 4, 8, 16, 32, 64]
    arguments.tokens = arguments.tokens or ([4096, 16384, 65536] if on_gpu else [512])
    arguments.dtype = arguments.dtype or (["bf16"] if on_gpu else ["fp32", "bf16"])
    arguments.divide = arguments.divide or (1 if on_gpu else 16)
    return arguments


def machine(device: str) -> dict[str, Any]:
    """Describes the machine that was measured."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        return found
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return found | {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}


def _cases(arguments: argparse.Namespace, tokens: Sequence[int], routings: Sequence[str]) -> list[Case]:
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
        for T in tokens
        for routing in arguments.routing or routings
    ]


def _missing(names: Sequence[str]) -> dict[str, str]:
    """Returns why libraries of third-party back ends cannot be used: missing, or an unknown version."""
    found = {name: THIRD_PARTY[name].missing() for name in names if name in THIRD_PARTY}
    return {name: why for name, why in found.items() if why is not None}


def _measure(arguments: argparse.Namespace, names: Sequence[str], bars: list[Bar]) -> dict[str, Any]:
    roof = Roof(arguments.peak_tflops * 1e12, arguments.bandwidth_tbs * 1e12)
    figures: dict[str, Any] = {}
    if "products" in arguments.part:
        figures["products"] = products_table(arguments.rounds, bars)
    if "layer" in arguments.part:
        cases = _cases(arguments, arguments.tokens, ROUTINGS)
        figures["layers"] = layers_table(cases, names, arguments.rounds, roof, bars)
    if "decode" in arguments.part:
        cases = _cases(arguments, arguments.decode_tokens[-1:], ROUTINGS[:1])
        figures["decode"] = decode_table(cases, arguments.decode_tokens, names, arguments.rounds, roof, bars)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes the requested files."""
    arguments = _parse(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    about = machine(arguments.device) | {"clocks": clocks(device)}
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    missing = _missing(arguments.backend)
    for name, why in missing.items():
        print(f"without {name}: {why}")
    names = [name for name in arguments.backend if name not in missing]
    bars: list[Bar] = []
    figures: dict[str, Any] = {"machine": about, "rounds": arguments.rounds, "missing": missing}
    figures |= _measure(arguments, names, bars)
    figures["clocks_at_the_end"] = clocks(device)
    text = json.dumps(figures, indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json is not None:
        write_text(Path(arguments.json), text)
    if arguments.figure is not None:
        write_text(Path(arguments.figure), bars_svg("Experts by back end", bars))
    return 0
