"""Measures the loss of large vocabularies, whole and by rows: ``python -m tools.bench_loss --help``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from moe.errors import ConfigError
from tools.command import (
    check_json_target,
    check_positive,
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
        "bench_loss",
        "Peak memory and time of forward and backward pass of a head and its loss, with all logits at once "
        "and by rows, each in a process of its own, interleaved.",
        example="--vocabularies 49152,151936,262144 --tokens 2048",
    )
    add = parser.add_argument
    add("--vocabularies", default="49152,151936,262144", metavar="V,V,...", help="entries of the vocabulary")
    add("--tokens", type=int, default=1024, help="tokens of a micro-batch")
    add("--width", type=int, default=576, help="width of the model")
    add("--rounds", type=int, default=3, help="processes of each")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and returns 0.

    Raises:
        ConfigError: A flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    vocabularies, mistakes = read_numbers("--vocabularies", args.vocabularies)
    mistakes += check_json_target(args.json) + check_positive(args, "tokens", "width", "rounds")
    if mistakes:
        raise ConfigError(mistakes)
    from recipes.studies.benchmarks.loss_memory import LossShape, measure

    log = log_beside(args.json)
    log(
        f"{'vocabulary':>10}  {'whole MiB':>9}  {'rows MiB':>8}  {'time, rows / whole':>18}  {'differ by':>9}"
    )
    found = []
    for vocabulary in vocabularies:
        figures = measure(LossShape(vocabulary, args.tokens, args.width), args.rounds)
        found.append(asdict(figures))
        log(
            f"{vocabulary:>10} {figures.whole_mib:>9.0f} {figures.rows_mib:>9.0f} "
            f"{figures.rows_s / figures.whole_s:>18.2f} {figures.largest_difference:>9.1e}"
        )
    write_json(args.json, machine_figures() | {"figures": found})
    return 0


if __name__ == "__main__":
    run_command(main)
