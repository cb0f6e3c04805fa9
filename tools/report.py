"""Rebuilds the report of a run, even while it trains: ``python -m tools.report --help``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tools.command import log_beside, run_command, tool_parser, write_json


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "report",
        "Writes RUN_DIR/report.html and RUN_DIR/figures, and prints the results.",
        example="outputs/RUN --figure losses.png",
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="run directory, such as outputs/upcycle-1")
    add("--figure", metavar="PNG", help="also draw the loss curves on their own into this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes the report and returns 0.

    Raises:
        GraftError: The report cannot be written.
    """
    args = build_parser().parse_args(argv)
    from recipes.tracking.report import build_report, readme_figure
    from recipes.tracking.report.results_table import read_results, results_table
    from recipes.tracking.report.run_record import read_run
    from recipes.tracking.report.sections import missing_parts

    log = log_beside(args.json)
    path = build_report(args.run_dir)
    record = read_run(args.run_dir)
    log(results_table(record.summary))
    gone = missing_parts(record)
    if gone:
        log("\nnot measured:")
    for text in gone:
        log(f"  {text}")
    log(f"\nreport: {path}")
    if args.figure:
        log(f"figure: {readme_figure(args.run_dir, args.figure)}")
    found: dict[str, Any] = {"report": str(path), "not_measured": gone}
    found["results"] = [asdict(result) for result in read_results(record.summary)]
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    run_command(main)
