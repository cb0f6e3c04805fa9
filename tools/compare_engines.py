"""Compares the losses of all engines: ``python -m tools.compare_engines [OPTION=VALUE ...]``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, check_least, run_command, stream_beside, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.studies.benchmarks.engine_losses import Series


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "compare_engines",
        "Runs the upcycling job from one start on native torch, DeepSpeed and Megatron, on 1 "
        "and more ranks, and prints how far the losses are from those of native torch on one rank.",
        epilog="Every OPTION=VALUE goes to graft train: dense=DIR, train.steps=200, router=deepseek_v3, ...",
        example="--steps 20 router=deepseek_v3 --json losses.json",
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of graft train")
    add("--steps", type=int, default=50, metavar="N", help="steps of each run")
    add("--only", metavar="WORD", help="run only layouts with this word in their name, and the first")
    add("--keep", metavar="DIR", help="keep the runs in this folder (default: delete them)")
    return parser.parse_intermixed_args()


def main() -> int:
    """Runs the layouts one after the other and prints the table."""
    arguments = _parse()
    mistakes = check_json_target(arguments.json)
    mistakes += check_least(arguments, steps=1)
    from recipes.studies.benchmarks.engine_losses import compared_layouts, run_layouts

    first, *others = compared_layouts()
    chosen = [first, *(one for one in others if (arguments.only or "") in one.name)]
    if arguments.only and len(chosen) == 1:
        names = "; ".join(one.name for one in others)
        mistakes.append(
            Mistake("--only", arguments.only, "no layout has it in its name", f"There are {names}.")
        )
    if mistakes:
        raise ConfigError(mistakes)
    overrides = [f"train.steps={arguments.steps}", *arguments.options]
    log = partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.keep).expanduser().absolute() if arguments.keep else Path(scratch)
        out = stream_beside(arguments.json)
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", file=out)
        done = _print(run_layouts(chosen, overrides, folder, log), out)
    figures = [
        {
            "layout": one.layout.name,
            "largest_relative_difference": one.distance(done[0]),
            "losses": one.losses,
            "validation_loss": one.validation,
            "median_step_s": one.step_s,
        }
        for one in done
    ]
    write_json(arguments.json, {"steps": arguments.steps, "runs": figures})
    return 0


def _print(runs: Iterable[Series], out: TextIO) -> list[Series]:
    """Prints a line for each run as soon as it has ended; returns all runs."""
    done: list[Series] = []
    heads = ("largest difference", "last loss", "validation", "s per step")
    print(f"{'layout':62}{heads[0]:>20}{heads[1]:>12}{heads[2]:>12}{heads[3]:>10}", file=out)
    for one in runs:
        done.append(one)
        apart = "-" if one is done[0] else f"{one.distance(done[0]):.1e}"
        losses = f"{one.losses[-1]:>12.6f}{one.validation:>12.6f}"
        print(f"{one.layout.name:62}{apart:>20}{losses}{one.step_s:>10.3f}", file=out, flush=True)
    return done


if __name__ == "__main__":
    run_command(main)
