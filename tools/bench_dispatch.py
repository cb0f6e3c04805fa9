"""Measures the weak scaling of the exchange between ranks: ``python -m tools.bench_dispatch --help``."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import asdict

from tools.command import (
    check_json_target,
    check_least,
    log_beside,
    machine_figures,
    read_numbers,
    run_command,
    tool_parser,
    write_json,
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "bench_dispatch",
        "Sends tokens to the ranks of their experts and back by all-to-all, with the same number "
        "of tokens on every rank, and compares the bytes that each rank sends with the least possible. The "
        "ranks are processes of this machine that talk over gloo.",
        example="--ranks 1,2,4 --experts 64 --top-k 8 --json -",
    )
    add = parser.add_argument
    add("--ranks", default="1,2,4", metavar="P,...", help="numbers of ranks")
    add("--tokens", type=int, default=4096, metavar="T", help="tokens of a rank")
    add("--width", type=int, default=1024, metavar="D", help="model width")
    add("--experts", type=int, default=8, metavar="E", help="experts on all ranks together")
    add("--top-k", type=int, default=2, metavar="K", help="experts per token")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the rows")
    add("--skewed", action="store_true", help="choose expert e with a share of 1/e, not all equally")
    add("--shared-width", type=int, default=1024, metavar="F", help="width of the shared expert")
    add("--rounds", type=int, default=15, metavar="N", help="timed rounds")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures and prints the table.

    Raises:
        ConfigError: A flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    sizes = _sizes(args)
    import torch

    from recipes.studies.benchmarks.dispatch_bytes import DispatchShape, measure, render

    shape = DispatchShape(
        args.tokens, args.width, args.experts, args.top_k, args.dtype, args.skewed, args.shared_width
    )
    machine = {
        **machine_figures(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": "gloo",
        "threads_a_rank": 1,
    }
    log = log_beside(args.json)
    log(", ".join(f"{name} {value}" for name, value in machine.items()))
    found = [measure(shape, ranks, args.rounds) for ranks in sizes]
    log(render(found, shape, os.cpu_count() or 1))
    figures = {
        "machine": machine,
        "shape": asdict(shape),
        "rounds": args.rounds,
        "times_scale": max(sizes) < (os.cpu_count() or 1),
        "ranks": [asdict(one) for one in found],
    }
    write_json(args.json, figures)
    return 0


def _sizes(args: argparse.Namespace) -> list[int]:
    """Returns the numbers of ranks once all flags are checked."""
    from moe.errors import ConfigError, Mistake

    mistakes = check_json_target(args.json)
    mistakes += check_least(args, tokens=1, width=1, experts=1, top_k=1, shared_width=1, rounds=1)
    if args.top_k > args.experts:
        rule = f"a token cannot use more experts than the {args.experts} there are"
        mistakes.append(Mistake("--top-k", args.top_k, rule, "Lower it."))
    if args.top_k == args.width:
        rule = "rows and combine weights of one width cannot be told apart on the wire"
        mistakes.append(Mistake("--width", args.width, rule, "Choose another."))
    sizes, unread = read_numbers("--ranks", args.ranks)
    mistakes += unread
    for ranks in sizes:
        if args.experts % ranks:
            rule = f"the {args.experts} experts of --experts do not divide over {ranks} ranks"
            mistakes.append(Mistake("--ranks", args.ranks, rule, "Choose divisors."))
    if mistakes:
        raise ConfigError(mistakes)
    return sizes


if __name__ == "__main__":
    run_command(main)
