"""Compares routers: ``python -m tools.compare routers=[topk,ssr,sinkhorn] seeds=3 [OPTION=VALUE ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe.errors import ConfigError, Mistake
from recipes.config.compose import compose_config
from tools.command import check_least, run_command, tool_parser

_DEFAULT_ROUTERS = "topk,switch,sigmoid,deepseek_v3,ssr,sinkhorn,comet,relu"


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = tool_parser(
        "compare",
        "Trains the upcycling job under each router and seed, everything else equal, and "
        "prints and draws one page. A comparison that was interrupted goes on; a failed run does not take "
        "the others down.",
        epilog="Every other OPTION=VALUE goes to train.py: train.steps=200, upcycle.num_experts=16, ...",
        json_flag=False,
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="routers=[...], seeds=N, and train.py's")
    add("--name", default="routers", help="folder below outputs/compare")
    add("--ranks", type=int, default=1, help="processes of each run")
    add("--parallel", type=int, default=1, help="runs at a time; set engine.threads with it")
    add("--only-page", action="store_true", help="train nothing, draw what is there")
    arguments = parser.parse_intermixed_args()
    return arguments, arguments.options


def _split(options: list[str]) -> tuple[list[str], int, list[str]]:
    """Splits the options into routers, seeds, and overrides of train.py."""
    from recipes.studies.option_lists import conf_choices

    own = dict(o.split("=", 1) for o in options if o.startswith(("routers=", "seeds=")))
    rest = [o for o in options if not o.startswith(("routers=", "seeds="))]
    routers = [r.strip() for r in own.get("routers", _DEFAULT_ROUTERS).strip("[]").split(",") if r.strip()]
    known = conf_choices("router")
    mistakes = [
        Mistake("routers", router, "there is no such router", f"Choose from: {', '.join(known)}.")
        for router in routers
        if router not in known
    ]
    seeds = own.get("seeds", "3")
    if not seeds.isdigit() or int(seeds) < 1:
        mistakes.append(Mistake("seeds", seeds, "it must be a whole number of at least 1", "Give 3."))
    if not routers:
        mistakes.append(Mistake("routers", own["routers"], "the list is empty", "Name at least one router."))
    if mistakes:
        raise ConfigError(mistakes)
    return routers, int(seeds), rest


def main() -> int:
    """Runs the missing trials, then writes the page; returns 1 when a run failed."""
    arguments, options = _parse()
    routers, seeds, overrides = _split(options)
    if mistakes := check_least(arguments, ranks=1, parallel=1):
        raise ConfigError(mistakes)
    for router in routers:
        compose_config(["+recipe=upcycle", *overrides, f"router={router}"])
    from recipes.studies.comparison.collect_runs import collect
    from recipes.studies.comparison.comparison_page import text_table, write_page
    from recipes.studies.comparison.router_trials import plan_trials
    from recipes.studies.sweep import launcher, run_trials

    folder = Path("outputs").absolute() / "compare" / arguments.name
    trials = plan_trials(folder, routers, seeds)
    if not arguments.only_page:
        launch = launcher(overrides, arguments.ranks)
        run_trials(trials, launch, arguments.parallel, lambda line: print(line, flush=True))
    results = collect(trials)
    options_text = " ".join(overrides) or "the defaults of the main job"
    page = write_page(folder, results, f"{len(routers)} routers, {seeds} seeds; {options_text}")
    print(f"\n{text_table(results)}\n\npage: {page}")
    return 0 if all(trial.done for trial in trials) else 1


if __name__ == "__main__":
    run_command(main)
