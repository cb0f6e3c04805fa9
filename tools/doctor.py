"""Reports the abilities and problems of this machine: ``python -m tools.doctor --help``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from moe.errors import ConfigError
from tools.command import check_json_target, run_command, stream_beside, tool_parser, write_json

MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "doctor",
        "Reports what this machine can run and what is wrong. Exits with 1 if something is bad.",
        example="--cache-dir ~/.cache/graft --json -",
    )
    add = parser.add_argument
    add("--cache-dir", default="~/.cache/graft", metavar="DIR", help="cache folder of the runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the findings; returns 0 when nothing is bad, else 1.

    Raises:
        ConfigError: The target of ``--json`` cannot be written.
    """
    args = build_parser().parse_args(argv)
    if mistakes := check_json_target(args.json):
        raise ConfigError(mistakes)
    from recipes.runtime.environment import inspect_environment

    findings = inspect_environment(args.cache_dir)
    out = stream_beside(args.json)
    for finding in findings:
        print(f"{MARKS[finding.status]}  {finding.name}: {finding.text}", file=out)
        if finding.remedy:
            print(f"      -> {finding.remedy}", file=out)
    counts = {status: sum(f.status == status for f in findings) for status in MARKS}
    print(f"{counts['ok']} ok, {counts['warn']} to note, {counts['bad']} bad", file=out)
    write_json(args.json, {"counts": counts, "findings": [asdict(finding) for finding in findings]})
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    run_command(main)
