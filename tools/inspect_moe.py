"""Looks inside a mixture of experts: ``python -m tools.inspect_moe MODEL --text PATH``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from tools.command import log_beside, run_command, stream_beside, tool_parser, write_json
from tools.mixture_flags import check_mixture, text_config

if TYPE_CHECKING:
    from recipes.data.config import DataConfig


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "inspect_moe",
        "Looks inside a mixture while text runs through it: load, dead experts, twins, near ties, and which "
        "tokens go where. The whole mixture is held in memory in fp32.",
        "docs/inspect.md says what each number means, and when to worry.",
        example="MIXTURE --text held_out.jsonl --out INSPECTED",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the mixture: docs/continue.md lists the families")
    add("--text", required=True, metavar="PATH", help="text to look at: from its beginning")
    add("--samples", type=int, default=64, metavar="N", help="samples to look at")
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of a sample")
    add(
        "--dense",
        metavar="DIR",
        help="the dense model that the experts began as, to measure how far they are",
    )
    add("--out", metavar="DIR", help="folder for a page with pictures (inspect.html)")
    add("--trust-remote-code", action="store_true", help="run code that the folder brings (auto_map)")
    return parser.parse_args()


def main() -> int:
    """Checks the flags, looks, and prints a table and findings."""
    arguments = _parse()
    data = text_config(arguments)
    if mistakes := _check(arguments, data):
        raise ConfigError(mistakes)
    from recipes.upcycling.inspection.inspect_mixture import InspectRequest, inspect
    from recipes.upcycling.inspection.inspect_table import text_report

    request = InspectRequest(
        Path(arguments.model).expanduser(),
        data,
        arguments.samples,
        None if arguments.dense is None else Path(arguments.dense).expanduser(),
        arguments.trust_remote_code,
    )
    figures = inspect(request, log_beside(arguments.json))
    print(text_report(figures), file=stream_beside(arguments.json))
    write_json(arguments.json, figures)
    if arguments.out is not None:
        from recipes.upcycling.inspection.inspect_page import write_page

        page = write_page(Path(arguments.out).expanduser(), figures)
        print(f"page: {page}", file=stream_beside(arguments.json))
    return 0


def _check(arguments: argparse.Namespace, data: DataConfig) -> list[Mistake]:
    mistakes = check_mixture(arguments, data)
    if arguments.out is not None and Path(arguments.out).expanduser().is_file():
        mistakes.append(Mistake("--out", arguments.out, "it is a file", "Name a folder."))
    if arguments.dense is not None:
        from recipes.models.hf.inspection import check_dense

        found = check_dense(arguments.dense, trust_remote_code=arguments.trust_remote_code)
        mistakes += [replace(mistake, path="--dense") for mistake in found]
    return mistakes


if __name__ == "__main__":
    run_command(main)
