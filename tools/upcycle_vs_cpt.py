"""Compares upcycling to CPT and scratch: ``python -m tools.upcycle_vs_cpt --lengths 200,800 --seeds 3``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from moe.errors import ConfigError, Mistake
from recipes.runtime.interrupt import INTERRUPTED
from tools.command import (
    check_json_target,
    check_least,
    log_beside,
    read_numbers,
    run_command,
    tool_parser,
    write_json,
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "upcycle_vs_cpt",
        "Upcycled, the dense model continued, and an MoE from scratch, at equal tokens and at "
        "equal FLOPs, over the length of the dense pre-training, and against what serving costs. A grid that "
        "was interrupted goes on; a failed run does not take the others down.",
        epilog="Every other OPTION=VALUE goes to graft train +recipe=upcycle_vs_cpt: train.steps=200, ... A "
        "dense checkpoint per length is dense=/path/step-{length}. See docs/upcycle_vs_cpt.md.",
        example="--lengths 200,800 --seeds 3 train.steps=200",
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of graft train")
    add("--lengths", default="200,800", metavar="N,...", help="steps of the dense pre-training")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each length")
    add("--name", default="default", help="folder below outputs/upcycle_vs_cpt")
    add("--ranks", type=int, default=1, help="processes of each run")
    add("--parallel", type=int, default=1, help="runs at a time; set engine.threads with it")
    add("--only-page", action="store_true", help="train nothing, draw what is there")
    return parser


def _check_dense(lengths: list[int], overrides: list[str]) -> list[Mistake]:
    """Requires a dense checkpoint for each length, where one is named."""
    from recipes.studies.upcycle_vs_cpt.arms_trials import LENGTH

    named = [option for option in overrides if option.startswith("dense=")]
    if not named or LENGTH in named[0] or len(lengths) == 1:
        return []
    rule = f"it names one checkpoint for {len(lengths)} lengths"
    return [Mistake("dense", named[0][6:], rule, f"Write {LENGTH} where the paths differ.")]


def main(argv: list[str] | None = None) -> int:
    """Runs the missing trials, then writes the page; returns 1 when a run failed.

    Raises:
        ConfigError: An option cannot be used, or the folder holds runs of other options.
    """
    arguments = build_parser().parse_intermixed_args(argv)
    read, mistakes = read_numbers("--lengths", arguments.lengths)
    mistakes += check_least(arguments, seeds=1, ranks=1, parallel=1) + check_json_target(arguments.json)
    if mistakes:
        raise ConfigError(mistakes)
    lengths, seeds, overrides = sorted(set(read)), arguments.seeds, arguments.options
    from recipes.jobs.sweep import checked, launcher, run_all
    from recipes.studies.upcycle_vs_cpt.arms_page import text_tables, write_page
    from recipes.studies.upcycle_vs_cpt.arms_trials import keep_options, options_of, plan_trials
    from recipes.studies.upcycle_vs_cpt.collect_arms import collect

    log = log_beside(arguments.json)
    folder = Path("outputs").absolute() / "upcycle_vs_cpt" / arguments.name
    trials = plan_trials(folder, lengths, seeds, overrides)
    if not arguments.only_page:
        if mistakes := _check_dense(lengths, overrides):
            raise ConfigError(mistakes)
        trials = checked(trials, arguments.ranks)
        keep_options(folder, overrides)
        launch = launcher(arguments.ranks, to_files=True)
        if run_all(trials, launch, log, parallel=arguments.parallel).stopped:
            return INTERRUPTED
    found = collect(trials)
    if not found.cells:
        failed = ", ".join(found.missing)
        log(f"no run has come to its end ({failed}); their logs are in {folder / 'runs'}")
        return 1
    page = write_page(folder, found, " ".join(options_of(folder) or overrides) or "the recipe's defaults")
    log(f"\n{text_tables(found)}\n\npage: {page}")
    write_json(arguments.json, {"page": str(page), **asdict(found)})
    return 1 if found.missing else 0


if __name__ == "__main__":
    run_command(main)
