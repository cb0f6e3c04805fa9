"""Writes a quantised checkpoint as a plain one: ``python -m tools.dequantize FOLDER --out DIR``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moe.errors import ConfigError
from tools.command import (
    check_existing_folder,
    check_json_target,
    log_beside,
    run_command,
    tool_parser,
    write_json,
)

_DTYPES = {"source": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "dequantize",
        "Writes a quantised checkpoint, dense or a mixture, as a plain one of the same class, tensor by "
        "tensor: FP8 with scales by block (DeepSeek-V3, Qwen3, GLM, MiniMax-M2) and MXFP4 (gpt-oss). Tensors "
        "that are plain already keep their bytes. What Graft can do with the result depends on its family.",
        example="Qwen3-4B-FP8 --out Qwen3-4B",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the quantised checkpoint")
    add("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    add(
        "--dtype",
        default="source",
        choices=_DTYPES,
        help="dtype of what was packed (default source: as config.json says). fp32 holds value times scale "
        "as it is, the others round it once",
    )
    add("--trust-remote-code", action="store_true", help="carry code that the folder brings (auto_map)")
    return parser.parse_args()


def main() -> int:
    """Checks the flags and writes the folder."""
    arguments = _parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    mistakes = check_json_target(arguments.json) + check_existing_folder("FOLDER", arguments.folder)
    if mistakes:
        raise ConfigError(mistakes)
    import torch

    from recipes.models.export.output_folder import refuse_existing
    from recipes.models.packed.dequantise import dequantise

    folder, out = (Path(text).expanduser() for text in (arguments.folder, arguments.out))
    refuse_existing(out, "--out")
    dtype, log = _DTYPES[arguments.dtype], log_beside(arguments.json)
    chosen = None if dtype is None else getattr(torch, dtype)
    found = dequantise(folder, out, chosen, log, trust_remote_code=arguments.trust_remote_code)
    name = str(found.dtype).removeprefix("torch.")
    left = f", {found.left_out} scales of activations left out" if found.left_out else ""
    log(
        f"dequantised {found.packed} tensors from {found.format} to {name}, copied {found.copied} as they "
        f"are{left}: {found.total_bytes / 2**30:.2f} GiB in {out}"
    )
    figures = {"out": str(out), "format": found.format, "dtype": name, "packed": found.packed}
    write_json(
        arguments.json,
        figures | {"copied": found.copied, "left_out": found.left_out, "bytes": found.total_bytes},
    )
    return 0


if __name__ == "__main__":
    run_command(main)
