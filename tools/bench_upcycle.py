"""Times conversions against ``cp`` and measures their memory: ``python -m tools.bench_upcycle --help``."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe.errors import UserError
from tools.command import (
    check_existing_folder,
    check_json_target,
    check_least,
    machine_figures,
    run_command,
    tool_parser,
    write_json,
)


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "bench_upcycle",
        "Converts random Llamas of three sizes (75, 300 and 880 million parameters, bf16) and "
        "copies each result with cp on the same disk, in turn; prints medians, draws memory against size.",
        example="--method drop --experts 8 --rounds 1",
    )
    add = parser.add_argument
    add("--folder", metavar="DIR", help="where to work (default: the system's temporary folder)")
    add("--method", default="copy", help="a choice of conf/upcycle")
    add("--experts", type=int, default=8, help="routed experts")
    add("--rounds", type=int, default=3, help="conversions and copies of each size")
    add("--figure", metavar="PNG", help="draw memory against size")
    return parser.parse_args()


def main() -> int:
    """Measures every size and prints the table."""
    arguments = _parse()
    mistakes = check_json_target(arguments.json)
    mistakes += check_least(arguments, rounds=1) + check_existing_folder("--folder", arguments.folder)
    if mistakes:
        raise UserError(mistakes)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from recipes.studies.benchmarks.conversion_speed import SIZES, draw_memory, make_dense, measure_conversion

    print(f"{arguments.method}, {arguments.experts} experts, bf16; {arguments.rounds} rounds, medians")
    print(
        f"{'dense':>8}{'output':>10}{'convert':>10}{'cp':>8}{'cp+sync':>9}{'rate of cp+sync':>17}"
        f"{'start':>8}{'peak':>10}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for size in SIZES:
            dense = Path(folder) / f"dense-{size.hidden_size}"
            parameters = make_dense(size, dense)
            timings = list(
                measure_conversion(dense, Path(folder), arguments.method, arguments.experts, arguments.rounds)
            )
            row: dict[str, Any] = {
                key: statistics.median(getattr(timing, key) for timing in timings)
                for key in asdict(timings[0])
            }
            row |= {"parameters": parameters, "largest_tensor_bytes": size.largest_tensor_bytes}
            row["rounds"] = [asdict(timing) for timing in timings]
            rows.append(row)
            print(_line(row), flush=True)
    if arguments.figure is not None:
        draw_memory(rows, Path(arguments.figure))
    write_json(arguments.json, machine_figures() | {"method": arguments.method, "rows": rows})
    return 0


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['parameters'] / 1e6:7.0f}M{row['output_bytes'] / 2**30:6.2f} GiB{row['seconds']:8.1f} s"
        f"{row['copy_seconds']:6.1f} s{row['copy_sync_seconds']:7.1f} s"
        f"{row['copy_sync_seconds'] / row['seconds']:17.2f}{row['start_seconds']:6.1f} s"
        f"{row['peak_bytes'] / 2**20:6.0f} MiB"
    )


if __name__ == "__main__":
    run_command(main)
