"""Writes a GGUF file as a folder of transformers: ``python -m tools.import_gguf --help``."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from moe.errors import ConfigError
from tools.command import check_json_target, log_beside, run_command, tool_parser, write_json

_DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "import_gguf",
        "Writes the model of a GGUF file (Llama, Qwen2, Qwen3, Gemma, Mistral, their mixtures, and what else "
        "transformers reads) as an ordinary folder of transformers, dequantised. Then it can be upcycled.",
        example="SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2",
    )
    parser.add_argument("file", metavar="FILE", help="the .gguf file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=_DTYPES,
        help="dtype of the weights: what a quantised file says takes fp32, the others round it",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes the folder and returns 0.

    Raises:
        ModelError: The file cannot be read.
        ConfigError: A flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    if mistakes := check_json_target(args.json):
        raise ConfigError(mistakes)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the reader, which obey nothing else
    import torch

    from recipes.models.hf.gguf_file import import_gguf

    file, out = (Path(text).expanduser() for text in (args.file, args.out))
    found = import_gguf(file, out, getattr(torch, args.dtype))
    log = log_beside(args.json)
    for line in found.lines():
        log(line)
    figures = asdict(found) | {"path": str(found.path), "dtype": args.dtype}
    write_json(args.json, figures)
    return 0


if __name__ == "__main__":
    run_command(main)
