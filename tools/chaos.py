"""Kills ranks of a training job and checks its recovery: ``python -m tools.chaos --kills 50``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake
from recipes.studies.chaos.chaos_settings import AIMS, ChaosSettings
from tools.command import check_json_target, check_least, check_positive, run_command, tool_parser, write_json


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "chaos",
        "Starts a small training job under torchrun --max-restarts, kills ranks with SIGKILL at "
        "random moments, and compares its results with an undisturbed run of the same job: every figure of "
        "every step, the load of every expert, the exported weights. Ends with 0 only when all kills were "
        "done, training went on from the newest complete checkpoint each time, and nothing differs.",
        epilog="Every other OPTION=VALUE goes to graft train: router=ssr, engine.expert_parallel=2, ...",
        example="--kills 5 --ranks 2 --steps 100 router=deepseek_v3",
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of graft train")
    add("--kills", type=int, default=50, help="ranks to kill")
    add("--ranks", type=int, default=2, help="processes of the job")
    add("--steps", type=int, default=1000, help="optimizer steps of the job")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add(
        "--aim",
        choices=AIMS,
        default="mixed",
        help="anywhere: uniform over the steps; saves: while a checkpoint is written; start: while a restart "
        "starts up; mixed (default): half, a third and a sixth of them",
    )
    add("--sync-save", action="store_true", help="set train.async_save=false")
    add("--disk-mib-s", type=float, help="simulate a disk with this rate per rank, MiB/s")
    add("--seed", type=int, default=0, help="seed of moments and victims")
    add("--patience", type=float, default=180.0, help="seconds without a step before giving up")
    add("--folder", default="outputs/chaos", help="folder of both runs")
    return parser.parse_intermixed_args()


def _check(arguments: argparse.Namespace) -> None:
    mistakes = check_json_target(arguments.json)
    mistakes += check_least(arguments, kills=1, ranks=1, steps=2, save_every=1)
    mistakes += check_positive(arguments, "disk_mib_s", "patience")
    if arguments.save_every > arguments.steps:
        rule = "there would be no save before the last step"
        mistakes.append(Mistake("--save-every", arguments.save_every, rule, "Lower it, or raise --steps."))
    for option in arguments.options:
        if "=" not in option:
            mistakes.append(
                Mistake("OPTION=VALUE", option, "has no =", "Give the options of graft train as name=value.")
            )
    if mistakes:
        raise ConfigError(mistakes)


def _table(found: dict[str, Any]) -> str:
    own = found["own_figures"] or {}
    aims = ", ".join(f"{number} {kind}" for kind, number in found["kills_by_aim"].items() if number)
    seconds = [found[f"recovery_{which}_s"] for which in ("median", "p90", "max")]
    recovery = " / ".join("-" if value is None else f"{value:.1f}" for value in seconds)
    disk = found["simulated_disk_mib_s"]
    rows = {
        "job": f"{found['ranks']} ranks, {found['steps']} steps, a save every {found['save_every']}, "
        f"{'asynchronous' if found['async_save'] else 'synchronous'}"
        + ("" if disk is None else f", simulated disk of {disk:g} MiB/s per rank"),
        "kills": f"{found['kills']} of {found['asked_kills']} ({aims}; {found['kills_during_a_save']} in a "
        "save)",
        "recoveries": f"{found['recoveries']} ({found['kills_before_recovery']} kills came before one)",
        "recovery s, median/p90/max": recovery,
        "steps done again, all/median/max": f"{found['lost_steps']} / {found['lost_steps_median']} / "
        f"{found['lost_steps_max']}",
        "from the newest checkpoint": f"{found['from_newest_checkpoint']} of {found['kills']}",
        "bit-identical": "yes" if found["difference"] is None else f"no: {found['difference']}",
        "wall time": f"{found['wall_s']:.0f} s; steps undisturbed: {found['undisturbed_steps_s']:.0f} s",
        "recovery s, all": f"{found['recovery_sum_s']:.1f} seen from outside; the run itself counts "
        f"{own.get('recovery_s', 0):.1f} in {own.get('recoveries', 0)} recoveries",
        "the run's own figures": f"goodput {own.get('goodput', 0):.3f}, {own.get('processes', 0)} processes, "
        f"{own.get('lost_steps_s', 0):.1f} s of steps lost, {own.get('saving_s', 0):.1f} s waited for saves",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def main() -> int:
    """Runs the experiment and prints its table; returns 1 when a guarantee was broken."""
    arguments = _parse()
    _check(arguments)
    from recipes.studies.chaos.experiment import passed, run_chaos

    settings = ChaosSettings(
        folder=Path(arguments.folder).expanduser().absolute(),
        kills=arguments.kills,
        ranks=arguments.ranks,
        steps=arguments.steps,
        save_every=arguments.save_every,
        aim=arguments.aim,
        seed=arguments.seed,
        disk_mib_s=arguments.disk_mib_s,
        async_save=not arguments.sync_save,
        patience_s=arguments.patience,
        options=arguments.options,
    )
    found = run_chaos(settings, lambda line: print(line, flush=True))
    print("\n" + _table(found))
    if found["second_runs"]:
        print(f"a restart began other runs: {', '.join(found['second_runs'])}")
    write_json(arguments.json, found)
    return 0 if passed(found) else 1


if __name__ == "__main__":
    run_command(main)
