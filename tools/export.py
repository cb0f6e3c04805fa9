"""Exports a checkpoint of a run as a Hugging Face folder: ``python -m tools.export RUN --out DIR``."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError
from tools.command import check_format, check_json_target, run_command, stream_beside, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.jobs.export_run import Exported


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "export",
        "Writes the MoE of any checkpoint of a run as a folder that transformers loads, or "
        "in Graft's own format where no class of transformers computes the same. Reads tensor by tensor.",
        example="outputs/RUN --out MOE --dtype bf16",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run's directory")
    add("--out", required=True, metavar="DIR", help="folder of the model; must not exist")
    stages = ("moe", "cpt")
    add(
        "--stage",
        choices=stages,
        default="moe",
        help="the MoE, or the dense model trained beside it",
    )
    add("--step", type=int, help="step of the checkpoint (default: the newest complete one)")
    add(
        "--dtype",
        choices=("source", "fp32", "bf16", "fp16"),
        default="source",
        help="default: the dense one's",
    )
    add("--target", default="auto", metavar="FORMAT", help="format (default: the best exact)")
    add(
        "--layout",
        choices=("per_expert", "fused"),
        default="per_expert",
        help="layout of the experts' tensors",
    )
    return parser.parse_args()


def _describe(done: Exported, run: str) -> str:
    readers, check = ", ".join(done.exact_in), done.check
    # What little of a training is left is no exact copy of it, though the files are read exactly.
    lossy = check.rounding is not None and check.rounding.loses_most
    lines = [
        f"step {done.step} of {run} as {done.format}, {'for' if lossy else 'exact in'} {readers}; "
        f"{done.total_bytes / 2**30:.2f} GiB in {done.path}",
        f"reloaded, its logits differ from the checkpoint's by {check.logits.relative:.1e} of the largest "
        f"on {check.tokens}",
    ]
    if check.rounding is not None:
        lines.append(check.rounding.words("--dtype fp32", check.tokens))
    return "\n".join(lines)


def main() -> int:
    """Checks the flags, writes the folder and names its format."""
    arguments = _parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from recipes.jobs.export_run import ExportRequest, export_run
    from recipes.models.export import exporters

    mistakes = check_json_target(arguments.json)
    mistakes += check_format(arguments.target, exporters())
    if mistakes:
        raise ConfigError(mistakes)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    request = ExportRequest(
        run=Path(arguments.run).expanduser().absolute(),
        step=arguments.step,
        dtype=dtypes.get(arguments.dtype),
        target=arguments.target,
        layout=arguments.layout,
        stage=arguments.stage,
    )
    done = export_run(request, Path(arguments.out).expanduser().absolute())
    print(_describe(done, request.run.name), file=stream_beside(arguments.json))
    figures = asdict(done)
    write_json(arguments.json, {k: str(v) if isinstance(v, Path) else v for k, v in figures.items()})
    return 0


if __name__ == "__main__":
    run_command(main)
