"""Compares routers: ``python -m tools.compare --routers topk,ssr,sinkhorn --seeds 3 [OPTION=VALUE ...]``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from moe.errors import ConfigError, Mistake, choose
from recipes.runtime.interrupt import INTERRUPTED
from tools.command import check_json_target, check_least, log_beside, run_command, tool_parser, write_json

_DEFAULT_ROUTERS = "topk,switch,sigmoid,deepseek_v3,ssr,sinkhorn,comet,relu"


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "compare",
        "Trains the upcycling job under each router and seed, everything else equal, and "
        "prints and draws one page. A comparison that was interrupted goes on; a failed run does not take "
        "the others down.",
        epilog="Every other OPTION=VALUE goes to graft train: train.steps=200, upcycle.num_experts=16, ...",
        example="--routers topk,ssr,sinkhorn --seeds 3 train.steps=200",
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of graft train")
    add("--routers", default=_DEFAULT_ROUTERS, metavar="ROUTER,...", help="choices of conf/router")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each router")
    add("--name", default="routers", help="folder below outputs/compare")
    add("--ranks", type=int, default=1, help="processes of each run")
    add("--parallel", type=int, default=1, help="runs at a time; set engine.threads with it")
    add("--only-page", action="store_true", help="train nothing, draw what is there")
    return parser.parse_intermixed_args()


def _routers(given: str) -> list[str]:
    """Reads the routers to compare.

    Raises:
        ConfigError: There are none, or some do not exist.
    """
    from recipes.studies.option_lists import conf_choices

    known = conf_choices("router")
    routers = [router.strip() for router in given.split(",") if router.strip()]
    mistakes = [
        Mistake("--routers", router, "there is no such router", choose(router, known))
        for router in routers
        if router not in known
    ]
    if not routers:
        mistakes.append(Mistake("--routers", given, "the list is empty", "Name at least one router."))
    if mistakes:
        raise ConfigError(mistakes)
    return routers


def main() -> int:
    """Runs the missing trials, then writes the page; returns 1 when a run failed."""
    arguments = _parse()
    overrides, seeds = arguments.options, arguments.seeds
    mistakes = check_least(arguments, seeds=1, ranks=1, parallel=1) + check_json_target(arguments.json)
    if mistakes:
        raise ConfigError(mistakes)
    routers = _routers(arguments.routers)
    from recipes.jobs.sweep import checked, launcher, run_all
    from recipes.studies.comparison.collect_runs import collect
    from recipes.studies.comparison.comparison_page import text_table, write_page
    from recipes.studies.comparison.router_trials import plan_trials

    log = log_beside(arguments.json)
    folder = Path("outputs").absolute() / "compare" / arguments.name
    trials = plan_trials(folder, routers, seeds, overrides)
    if not arguments.only_page:
        trials = checked(trials, arguments.ranks)
        launch = launcher(arguments.ranks, to_files=True)
        if run_all(trials, launch, log, parallel=arguments.parallel).stopped:
            return INTERRUPTED
    results = collect(trials)
    options_text = " ".join(overrides) or "the defaults of the main job"
    page = write_page(folder, results, f"{len(routers)} routers, {seeds} seeds; {options_text}")
    log(f"\n{text_table(results)}\n\npage: {page}")
    write_json(arguments.json, {"page": str(page), "routers": [asdict(result) for result in results]})
    return 0 if all(trial.done for trial in trials) else 1


if __name__ == "__main__":
    run_command(main)
