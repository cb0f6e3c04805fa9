"""Compares routers on a generated multi-task table: ``python -m tools.compare_tables --help``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tools.command import check_json_target, check_least, run_command, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.studies.tables.table_runs import Experiment

_ROUTERS = ("dense", "topk", "hash", "dselect_k", "comet", "comet_plus")
_LRS = (3e-4, 1e-3, 3e-3, 1e-2)


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "compare_tables",
        "Trains a two-task recommendation model on a generated table under each router, "
        "everything else equal, and prints test AUC over seeds beside its ceiling. Learning rates are tried "
        "on seed 0 and chosen by validation. What is done is kept; a failed run takes no other down.",
        epilog="A router is a choice of conf/router, with options if need be: comet:entropy_coef=1,gamma=5. "
        "'dense' is one network as wide as the experts of a row.",
        example="--routers topk comet --seeds 2 --name small",
    )
    add = parser.add_argument
    add("--routers", nargs="+", default=list(_ROUTERS), metavar="ROUTER", help="what to compare")
    add("--seeds", type=int, default=5, help="runs of each router")
    add("--lrs", nargs="+", type=float, default=list(_LRS), metavar="LR", help="rates to try")
    add("--name", default="default", help="folder below outputs/tables")
    add("--data-seed", type=int, default=0, help="seed of the generated set")
    add("--rows", type=int, help="rows of the set (default: 50,000)")
    add("--epochs", type=int, help="most epochs of a run (default: 20)")
    add("--experts", type=int, help="experts of the layer (default: 16)")
    add("--top-k", type=int, help="experts per row (default: 2)")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--only-page", action="store_true", help="train nothing, show what is there")
    return parser.parse_args()


def _experiment(arguments: argparse.Namespace) -> Experiment:
    """Reads the flags; raises all mistakes at once."""
    from moe.errors import Mistake, UserError
    from recipes.studies.tables.generate import SPLITS, TableConfig
    from recipes.studies.tables.table_model import ModelConfig
    from recipes.studies.tables.table_routers import parse_moes
    from recipes.studies.tables.table_runs import Experiment
    from recipes.studies.tables.train_table import FitConfig

    mistakes = check_json_target(arguments.json)
    mistakes += check_least(arguments, seeds=1, rows=1000, epochs=1, experts=1, top_k=1, threads=1)
    mistakes += check_least(arguments, data_seed=0)
    if not all(lr > 0 for lr in arguments.lrs):
        mistakes.append(Mistake("--lrs", arguments.lrs, "rates must be above 0", "Give 0.001, say."))
    if arguments.name in ("", ".", "..") or "/" in arguments.name:
        mistakes.append(Mistake("--name", arguments.name, "it must be a plain name", "Leave out slashes."))
    if mistakes:
        raise UserError(mistakes)

    def given(**values: int | None) -> dict[str, int]:
        return {name: value for name, value in values.items() if value is not None}

    table = TableConfig(seed=arguments.data_seed, **given(num_rows=arguments.rows))
    model = ModelConfig(**given(num_experts=arguments.experts, top_k=arguments.top_k))
    fit = FitConfig(**given(epochs=arguments.epochs))
    steps = fit.max_steps(table.split_sizes()[SPLITS[0]])
    return Experiment(
        folder=Path("outputs").absolute() / "tables" / arguments.name,
        table=table,
        model=model,
        fit=fit,
        moes=parse_moes(arguments.routers, model, steps),
        seeds=arguments.seeds,
        lrs=tuple(dict.fromkeys(arguments.lrs)),
    )


def main() -> int:
    """Runs the missing trials, then prints the table; returns 1 when a run failed."""
    arguments = _parse()
    experiment = _experiment(arguments)
    import torch

    from recipes.studies.tables.generate import generate
    from recipes.studies.tables.table_page import ceiling_line, collect, plain, text_table, write_page
    from recipes.studies.tables.table_runs import check_kept, execute_missing, seed_by_seed, tuning_runs

    torch.set_num_threads(arguments.threads)
    check_kept(experiment)
    splits = generate(experiment.table)
    ceilings = splits["test"].ceilings()
    if not arguments.only_page:
        for runs in (tuning_runs, seed_by_seed):
            execute_missing(runs(experiment), splits, lambda line: print(line, flush=True))
    results = collect(experiment)
    print(f"\n{text_table(results)}\n\n{ceiling_line(ceilings)}")
    figures = plain(results, ceilings, experiment)
    print(f"page: {write_page(experiment.folder, results, ceilings, figures)}")
    write_json(arguments.json, figures)
    return 0 if not any(result.missing for result in results) else 1


if __name__ == "__main__":
    run_command(main)
