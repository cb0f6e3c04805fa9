"""Measures the cost of saving for a training step: ``python -m tools.bench_save --help``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from tools.command import (
    check_existing_folder,
    check_json_target,
    check_positive,
    log_beside,
    run_command,
    tool_parser,
    write_json,
)

_WIDTHS = (9, 8, 8, 9, 10, 8, 9)


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "bench_save",
        "Time of a training step without saves, with saves that training waits for, and with "
        "saves in the background. All run in one process, interleaved in random order; the checkpoints "
        "are compared with what was saved.",
        example="--rounds 5 --disk-mib-s 200",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=9, help="timed rounds of each")
    add("--steps", type=int, default=20, help="steps of a round, with one save")
    add("--width", type=int, default=1024, help="width of the square layers")
    add("--layers", type=int, default=8, help="number of layers")
    add("--batch", type=int, default=256, help="rows of a step")
    add("--threads", type=int, help="CPU threads (default: torch's own)")
    add("--disk-mib-s", type=float, help="simulate a disk with this rate, MiB/s")
    add("--folder", help="folder on the disk to measure (default: a temporary one)")
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    mistakes = check_json_target(arguments.json)
    mistakes += check_positive(
        arguments, "rounds", "steps", "width", "layers", "batch", "threads", "disk_mib_s"
    )
    mistakes += check_existing_folder("--folder", arguments.folder)
    if mistakes:
        raise ConfigError(mistakes)


def main() -> int:
    """Measures and prints a table."""
    arguments = _parse()
    _check(arguments)
    import torch

    from recipes.checkpoint.inventory import readable
    from recipes.studies.benchmarks.saves import NONE, WAYS, SaveShape, measure_saves
    from recipes.studies.chaos.slow_disk import slow_down

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.disk_mib_s is not None:
        slow_down(arguments.disk_mib_s)
    shape = SaveShape(arguments.width, arguments.layers, arguments.batch, arguments.steps)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found, size = measure_saves(shape, arguments.rounds, Path(folder), log_beside(None))
    rows: dict[str, Any] = {way: found[way].as_dict() for way in WAYS}
    disk = "the disk as it is"
    if arguments.disk_mib_s is not None:
        disk = f"a SIMULATED disk of {arguments.disk_mib_s:g} MiB/s"
    print(
        f"\ncheckpoint of {readable(size)} on {disk}, one every {shape.steps} steps; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, medians of {arguments.rounds} rounds\n"
    )
    names = ("step ms", "p10", "p90", "against", "stall ms", "most", "save ms")
    print(" " * 14 + "".join(f"{name:>{width}}" for name, width in zip(names, _WIDTHS, strict=True)))
    for way, row in rows.items():
        steps = [1e3 * row[f"step{which}_s"] for which in ("", "_p10", "_p90")]
        share = row["step_s"] / rows[NONE]["step_s"]
        rest = f"{1e3 * row['stall_s']:10.1f}{1e3 * row['stall_max_s']:8.1f}{1e3 * row['save_s']:9.1f}"
        print(f"{way:14}{steps[0]:9.1f}{steps[1]:8.1f}{steps[2]:8.1f}{share:8.3f}x{rest}")
    write_json(
        arguments.json,
        {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "checkpoint_bytes": size,
            "simulated_disk_mib_s": arguments.disk_mib_s,
            "steps": shape.steps,
            "rivals": rows,
        },
    )
    return 0


if __name__ == "__main__":
    run_command(main)
