"""Measures start-up: ``python -m tools.bench_start``."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from moe.errors import ConfigError
from recipes.runtime.source_root import SOURCE_ROOT, TRAIN
from tools.command import (
    check_json_target,
    check_least,
    log_beside,
    machine_figures,
    run_command,
    tool_parser,
    write_json,
)

_BASE = ["-c", "import torch, transformers"]
_COMMANDS = {
    "graft train --help": [*TRAIN, "--help"],
    "graft train --list router": [*TRAIN, "--list", "router"],
    "graft train --help train.steps": [*TRAIN, "--help", "train.steps"],
    "graft train --cfg": [*TRAIN, "--cfg", "+recipe=upcycle"],
    "a misspelt choice": [*TRAIN, "+recipe=upcycle", "router=topkk"],
    "a wrong value": [*TRAIN, "+recipe=upcycle", "train.steps=-1"],
    "top_k above num_experts": [*TRAIN, "+recipe=upcycle", "router.top_k=99"],
    "groups that do not divide": [*TRAIN, "+recipe=upcycle", "router=deepseek_v3", "router.num_groups=3"],
    "a router that is not there": [*TRAIN, "+recipe=upcycle", "router.name=nope"],
    "a back end that is not there": [*TRAIN, "+recipe=upcycle", "experts.backend=nope"],
    "Megatron's experts and LoRA": [
        *TRAIN,
        *["+recipe=upcycle", "engine=megatron", "engine.experts=megatron", "experts.lora.rank=2"],
    ],
    "heads that do not divide": [
        *TRAIN,
        *["+recipe=upcycle", "--nproc", "3", "train.global_batch_size=3", "engine.tensor_parallel=3"],
    ],
    "prompts that are not there": [*TRAIN, "+recipe=upcycle", "prompts.path=/no/such"],
    "an engine that contradicts": [*TRAIN, "+recipe=upcycle", "engine=deepspeed", "optim=muon"],
    "tools.upcycle --help": ["-m", "tools.upcycle", "--help"],
}


def main() -> int:
    """Runs each command in turn and prints the medians of their CPU seconds.

    Raises:
        ConfigError: A flag has a wrong value.
    """
    parser = tool_parser(
        "bench_start",
        "CPU seconds of commands that need no model, and their ratio to python -c 'import torch, "
        "transformers'. Each is a process of its own; medians over rounds.",
        example="--rounds 3 --json -",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each command")
    arguments = parser.parse_args()
    mistakes = check_least(arguments, rounds=1) + check_json_target(arguments.json)
    if mistakes:
        raise ConfigError(mistakes)
    log = log_beside(arguments.json)
    base = _median(_BASE, arguments.rounds)
    log(f"{base:6.2f} s         import torch, transformers")
    figures: dict[str, dict[str, float]] = {}
    for name, words in _COMMANDS.items():
        seconds = _median(words, arguments.rounds)
        figures[name] = {"cpu_seconds": seconds, "ratio": seconds / base}
        log(f"{seconds:6.2f} s  {seconds / base:6.1%}  {name}")
    write_json(arguments.json, {**machine_figures(), "import_cpu_seconds": base, "commands": figures})
    return 0


def _median(words: list[str], rounds: int) -> float:
    """Returns the median of the CPU seconds, user and system, of a python command."""
    found = []
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=SOURCE_ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        found.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(found)


if __name__ == "__main__":
    run_command(main)
