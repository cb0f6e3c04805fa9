"""Rebuilds the report of a run, also of one that is still training: ``python -m tools.report --help``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

from tools.command import run_command


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="Writes RUN_DIR/report.html and RUN_DIR/figures, and prints the results.",
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="run directory, such as outputs/upcycle-1")
    add("--json", metavar="PATH", help="write the results as JSON to this file too, or to stdout for -")
    add("--figure", metavar="PNG", help="also draw the loss curves on their own into this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 when the report is written.

    Raises:
        GraftError: Why it is not.
    """
    args = build_parser().parse_args(argv)
    from recipes.runtime.atomic import atomic_write_text
    from recipes.tracking.report import build_report, readme_figure
    from recipes.tracking.report.results_table import read_results, results_table
    from recipes.tracking.report.run_record import read_run
    from recipes.tracking.report.sections import missing_parts

    log = partial(print, file=sys.stderr if args.json == "-" else sys.stdout)
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
    text = json.dumps(found, indent=2)
    if args.json == "-":
        print(text)
    elif args.json:
        atomic_write_text(args.json, text + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
