"""Describes the cost of a model from its config alone: ``python -m tools.describe --help``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from moe.errors import ConfigError
from tools.command import (
    check_json_target,
    check_least,
    log_beside,
    read_config,
    run_command,
    tool_parser,
    write_json,
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "describe",
        "Prints parameters, FLOPs, and memory for training and serving of a model, from its "
        "config.json. No weights are read, or fetched from the hub.",
        example="MODEL/config.json --sequence-length 4096 --json -",
        reads_weights=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="config.json, or the folder of a checkpoint that holds one")
    add("--sequence-length", type=int, default=4096, metavar="N", help="tokens of a sequence")
    add("--batch-size", type=int, default=1, metavar="B", help="sequences at once")
    add("--kv-dtype", default="bfloat16", metavar="DTYPE", help="dtype of the cache")
    add(
        "--bits",
        nargs="+",
        default=[],
        metavar="CLASS=BITS",
        help="bits an element in serving, scales included, of a class of tensors, instead of what the "
        "config says: expert=4.25 attention=16",
    )
    add(
        "--tier",
        action="append",
        default=[],
        metavar="NAME=GB/S[:PART=SHARE,...]",
        help="a memory that weights or cache are served from; the first holds what the others leave: "
        "--tier hbm=3350 --tier pcie=55:experts=0.75",
    )
    add(
        "--from-module",
        action="store_true",
        help="for families that are not in the table: build the model of transformers without memory and "
        "count it; figures that its config does not give are left out",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Describes the model and returns 0.

    Raises:
        ConfigError: The config or a flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    content = _read(args)
    from moe.accounting.description import Request, describe_counted, describe_model, lines_of

    request = Request(
        args.sequence_length, args.batch_size, args.kv_dtype, tuple(args.bits), tuple(args.tier)
    )
    if args.from_module:
        from recipes.models.hf.shape_from_module import shape_from_module

        found = shape_from_module(content)
        figures = describe_counted(content, found.count, found.attention, request)
    else:
        figures = describe_model(content, request)
    log = log_beside(args.json)
    for line in lines_of(figures):
        log(line)
    write_json(args.json, figures)
    return 0


def _read(args: argparse.Namespace) -> Mapping[str, Any]:
    """Returns the content of the config once it and all flags are checked."""
    mistakes = check_json_target(args.json)
    mistakes += check_least(args, sequence_length=1, batch_size=1)
    content, unread = read_config(args.config, "Give a config.json, or the folder of one.")
    if mistakes := mistakes + unread:
        raise ConfigError(mistakes)
    return content


if __name__ == "__main__":
    run_command(main)
