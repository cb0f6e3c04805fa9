"""Measures bandwidth and FLOP/s of this machine: ``python -m tools.peaks --help``."""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, check_positive, log_beside, run_command, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.tracking.measure_peaks import Rate

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "peaks",
        "Bandwidth (read, copy, triad, matrix times vector, on arrays larger than the cache) and "
        "square products by dtype: best, median and spread. A median far below the best says that the "
        "machine is not quiet.",
        example="--device cpu --dtypes fp32,bf16 --json peaks.json",
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--dtypes", default="fp32,bf16", help=f"of products: {', '.join(_DTYPES)}")
    add("--rounds", type=int, default=10, metavar="N", help="rounds of the bandwidth")
    add("--seconds", type=float, default=0.5, metavar="S", help="seconds of each of three sweeps of products")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and returns 0.

    Raises:
        ConfigError: A flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    import torch

    from moe.accounting.device_peaks import device_name
    from recipes.tracking.measure_peaks import figures_of, measure_machine

    names = [name.strip() for name in args.dtypes.split(",")]
    mistakes = check_json_target(args.json)
    mistakes += check_positive(args, "rounds", "seconds", "threads")
    for name in names:
        if name not in _DTYPES:
            mistakes.append(Mistake("--dtypes", name, "it is not known", f"Known are {', '.join(_DTYPES)}."))
    kind, _, index = args.device.partition(":")
    if kind != "cpu" and not (kind == "cuda" and int(index or 0) < torch.cuda.device_count()):
        rule = f"there is no such device; torch sees {torch.cuda.device_count()} GPUs"
        mistakes.append(Mistake("--device", args.device, rule, "Give cpu, or a GPU that is there."))
    if mistakes:
        raise ConfigError(mistakes)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    load = os.getloadavg()[0]
    dtypes = [getattr(torch, _DTYPES[name]) for name in names]
    rates = measure_machine(device, dtypes, args.rounds, args.seconds)
    log = log_beside(args.json)
    log(f"{device_name(device)}, torch {torch.__version__}, load {load:.1f}")
    for line in _lines(rates):
        log(line)
    figures = {
        "device": device_name(device),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": load,
        "bytes_per_s": figures_of(rates["bytes_per_s"]),
        "flops": figures_of(rates["flops"]),
    }
    write_json(args.json, figures)
    return 0


def _lines(rates: dict[str, dict[str, Rate]]) -> list[str]:
    lines = [f"{'':12}{'best':>10}{'median':>10}{'p10':>10}{'p90':>10}"]
    for part, unit in (("bytes_per_s", "GB/s"), ("flops", "GFLOP/s")):
        for name, rate in rates[part].items():
            shown = "".join(f"{value / 1e9:10.2f}" for value in (rate.best, rate.median, rate.p10, rate.p90))
            mark = f", best of {rate.rounds}{'  (noisy)' if rate.noisy else ''}"
            lines.append(f"{name:12}{shown}  {unit:8} {rate.detail}{mark}")
    return lines


if __name__ == "__main__":
    run_command(main)
