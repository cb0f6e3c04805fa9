"""Certifies an exported mixture in the programs that serve it: ``python -m tools.certify --help``."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe.errors import ConfigError
from tools.command import check_json_target, check_least, log_beside, run_command, tool_parser, write_json


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "certify",
        "Loads an exported mixture in the programs that serve it, and compares what each computes with the "
        "trainer: experts of each token by layer, log-probabilities, KL divergence with routing free and "
        "pinned, greedy generation, perplexity. Writes certificate.json into the export.",
        example="outputs/RUN --in transformers,vllm --vllm ~/vllm/bin/python --text text.txt",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, whose newest checkpoint is the trainer; or an export alone")
    add("--in", dest="programs", default="transformers", metavar="A,B", help="transformers, vllm, llama.cpp")
    add("--text", metavar="PATH", help="text file (default: Python's standard library)")
    add("--sequences", type=int, default=4, metavar="N", help="sequences of the text")
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of each")
    add("--new-tokens", type=int, default=24, metavar="N", help="tokens to generate after half of each")
    add("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    add("--llama-cpp", metavar="DIR", help="folder of llama.cpp, built")
    add("--llama-cpp-bin", metavar="DIR", help="folder of its programs (default: build/bin in it)")
    add("--time-limit", type=float, default=3600.0, metavar="SECONDS", help="of each command of a program")
    text = "run code that an export brings (auto_map); a run's own is trusted as the run trusted it"
    add("--trust-remote-code", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Certifies, and returns 0 if every program computes what the trainer does, else 1.

    Raises:
        ConfigError: A flag cannot be used.
    """
    args = build_parser().parse_args(argv)
    mistakes = check_json_target(args.json) + check_least(
        args, sequences=1, sequence_length=16, new_tokens=0, time_limit=1
    )
    from recipes.cap.certify.base import Places
    from recipes.cap.certify.certify_export import certify_export
    from recipes.cap.certify.certify_run import choose_consumers
    from recipes.jobs.export_run import run_trusts_code

    model = Path(args.model).expanduser()
    trust = args.trust_remote_code or run_trusts_code(model)
    programs = (_path(args.vllm), _path(args.llama_cpp), _path(args.llama_cpp_bin))
    places = Places(*programs, args.time_limit, trust)
    log = log_beside(args.json)
    consumers, wrong = choose_consumers(args.programs.split(","), places, log)
    if mistakes + wrong:
        raise ConfigError(mistakes + wrong)
    found = certify_export(
        model,
        consumers,
        text=_path(args.text),
        sequences=args.sequences,
        length=args.sequence_length,
        new_tokens=args.new_tokens,
        log=log,
        trust_remote_code=trust,
    )
    write_json(args.json, found.content())
    return 0 if all(result.certified for result in found.results) else 1


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


if __name__ == "__main__":
    run_command(main)
