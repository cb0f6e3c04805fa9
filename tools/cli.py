"""Runs any of Graft's commands: ``graft NAME ARGUMENTS``, the same as ``python -m tools.NAME ARGUMENTS``."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata

from moe.errors import ConfigError
from tools.command import run_command

Commands = Mapping[str, tuple[str, str]]
#: What people want to do -> name -> module and what it does. Names of two words are those of a family.
GROUPS: Mapping[str, Commands] = {
    "Make a mixture of experts": {
        "upcycle": ("tools.upcycle", "convert a dense checkpoint, without training"),
        "train": ("recipes.launch", "upcycle, train, compare, report, export: all options of a run"),
        "dequantize": ("tools.dequantize", "write a quantised checkpoint as a plain one"),
        "import": ("tools.import_gguf", "write a GGUF file as a Hugging Face folder"),
        "parts": ("tools.collect_parts", "collect a small real model, text and tasks from packages"),
        "verify": ("tools.verify", "check that two checkpoints compute the same"),
        "export": ("tools.export", "write a checkpoint of a run as a Hugging Face folder"),
        "prune": ("tools.prune", "leave a mixture the experts that text needs most"),
        "merge": ("tools.merge", "merge a mixture's experts into those that text uses most"),
        "densify": ("tools.densify", "make a mixture dense: the mean of its experts"),
        "ders": ("tools.ders", "compress an MoE to a base and low-bit deltas, and back"),
        "tokenize": ("tools.tokenize", "tokenise documents ahead of time"),
    },
    "See what came of it": {
        "report": ("tools.report", "rebuild the report of a run, even while it trains"),
        "inspect": ("tools.inspect_moe", "look inside a mixture: load, dead and twin experts, near ties"),
        "compare": ("tools.compare", "train under several routers and seeds, on one page"),
        "upcycle-vs-cpt": ("tools.upcycle_vs_cpt", "upcycle, continue the dense model, or start over?"),
        "compare-tables": ("tools.compare_tables", "compare routers on tables with two tasks"),
        "eval": ("tools.eval_tasks", "score models on LAMBADA, HellaSwag, ... side by side"),
        "certify": ("tools.certify", "compare an export in vLLM, llama.cpp, ... with its trainer"),
        "cap": ("tools.cap", "measure how models use the hardware, their cost and accuracy"),
    },
    "Plan": {
        "describe": ("tools.describe", "count parameters, FLOPs and memory of any config"),
        "plan": ("tools.plan", "list parallel layouts that fit a cluster, with their speed"),
        "plan-upcycle": ("tools.plan_upcycle", "predict the loss of upcycling and of starting over"),
        "fit-laws": ("tools.fit_laws", "fit scaling laws to your runs"),
    },
    "Know the machine": {
        "doctor": ("tools.doctor", "say what this machine can run, and what is wrong with it"),
        "peaks": ("tools.peaks", "measure bandwidth and FLOP/s"),
        "chaos": ("tools.chaos", "kill ranks at random, and compare with an undisturbed run"),
        "tune": ("kernels.tune", "tune block sizes of the GPU kernels"),
        "compile": ("kernels.aot", "compile the GPU kernels without a GPU"),
    },
    "Benchmarks": {
        "bench start": ("tools.bench_start", "the start of commands that need no model"),
        "bench step": ("tools.bench_step", "a training step against a dense model"),
        "bench engines": ("tools.compare_engines", "losses and speed of native torch, DeepSpeed, Megatron"),
        "bench routers": ("tools.bench_routers", "every router, alone and in a step"),
        "bench kernels": ("kernels.bench", "expert kernels against other libraries"),
        "bench loss": ("tools.bench_loss", "memory and time of the loss of a large vocabulary"),
        "bench save": ("tools.bench_save", "what saving costs a step"),
        "bench upcycle": ("tools.bench_upcycle", "the converter against cp"),
        "bench sharded": ("tools.bench_sharded", "memory of each rank while an MoE is made"),
        "bench dispatch": ("tools.bench_dispatch", "the exchange of tokens between ranks"),
    },
}
COMMANDS: Commands = {name: entry for group in GROUPS.values() for name, entry in group.items()}
_TRAIN = "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that is named.

    Raises:
        ConfigError: There is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["-h"], ["--help"], ["help"]):
        print(help_text())
        return 0
    if arguments == ["--version"]:
        print(f"graft {_version()}")
        return 0
    if arguments[0] in ("-sc", "--shell-completion"):
        return _complete(arguments)
    family = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if family and not set(arguments[1:]) - {"-h", "--help"}:
        print(help_text(family))
        return 0
    name, rest = split_command(arguments)
    # The parsers of tools name the command as it was typed, and Python shows what it runs.
    sys.argv = [f"graft {name}", *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")
    return 0


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits a command line into the name of a command and its arguments.

    Raises:
        ConfigError: There is no such command.
    """
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, list(arguments[words:])
    family = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if family:
        given = " ".join(word for word in arguments[:2] if not word.startswith("-"))
        near = difflib.get_close_matches(given, family, n=1, cutoff=0.8) if given != arguments[0] else []
        remedy = f"Did you mean {near[0]}?" if near else f"Choose from: {', '.join(family)}."
        raise ConfigError.one("graft", given, "there is no such command", remedy)
    near = difflib.get_close_matches(arguments[0].replace("_", "-"), COMMANDS, n=1)
    remedy = f"Did you mean graft {near[0]}?" if near else "graft --help lists them."
    raise ConfigError.one("graft", arguments[0], "there is no such command", remedy)


def help_text(names: Collection[str] = COMMANDS) -> str:
    """Returns the list of these commands."""
    lines = ["usage: graft COMMAND [ARGUMENTS]; graft COMMAND --help says more"]
    for title, commands in GROUPS.items():
        listed = [f"  {name:<16}{text}" for name, (_, text) in commands.items() if name in names]
        lines += ["", title, *listed] if listed else []
    return "\n".join(lines)


def _version() -> str:
    try:
        return metadata.version("graft-moe")
    except metadata.PackageNotFoundError:
        return "of a checkout, which is not installed"


def _complete(arguments: Sequence[str]) -> int:
    """Prints what hydra's completion asks for: names of commands, or of ``train`` its options and choices."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    family = [name.split()[1] for name in COMMANDS if len(words) > 1 and name.startswith(f"{words[1]} ")]
    if family:
        print(*family)
        return 0
    if line and words[1:2] != [_TRAIN] or words[1:] == [_TRAIN] and not line.endswith(" "):
        print(*dict.fromkeys(name.split()[0] for name in COMMANDS))
        return 0
    # hydra completes what follows a program of one word and its own flags.
    os.environ["COMP_LINE"] = re.sub(
        r"(?<= )--(nproc|nproc-per-node|max-restarts)[= ]+\S* ?", "", line.replace(f" {_TRAIN}", "", 1)
    )
    sys.argv = ["graft", *arguments]
    runpy.run_module(COMMANDS[_TRAIN][0], run_name="__main__")
    return 0


def run() -> None:
    """Runs ``graft``."""
    run_command(main)


if __name__ == "__main__":
    run()
