"""Checks that two checkpoints compute the same: ``python -m tools.verify --dense DIR --moe DIR``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, check_least, run_command, stream_beside, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.data.config import DataConfig
    from recipes.upcycling.convert.folder_check import EquivalenceReport


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "verify",
        "The equivalence check on any two folders: logits on real text in fp32, and with --gradients "
        "the gradients of every parameter that both have. Exit code 0 when they agree, 1 when not.",
        example="--dense MODEL --moe MOE --samples 8",
    )
    add = parser.add_argument
    add("--dense", required=True, metavar="DIR", help="the dense checkpoint, or any other to compare with")
    add("--moe", required=True, metavar="DIR", help="the MoE: in a format of transformers or in Graft's own")
    add("--text", metavar="PATH", help="text to compare on (default: Python's standard library)")
    add("--samples", type=int, default=8, help="number of sequences")
    add("--sequence-length", type=int, default=128, help="tokens of a sequence")
    add("--gradients", action="store_true", help="compare gradients as well (memory for both models')")
    add("--trust-remote-code", action="store_true", help="run code that the folders bring (auto_map)")
    return parser.parse_args()


def main() -> int:
    """Checks the flags, loads both models and compares them."""
    arguments = _parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from recipes.data.config import DataConfig

    data = DataConfig(path=arguments.text)
    mistakes = _check(arguments, data)
    if mistakes:
        raise ConfigError(mistakes)

    from recipes.upcycling.convert.folder_check import compare_folders, real_tokens

    dense, moe = (Path(folder).expanduser() for folder in (arguments.dense, arguments.moe))
    trust, length = arguments.trust_remote_code, arguments.sequence_length
    tokens = real_tokens(dense, data, arguments.samples, length, trust_remote_code=trust)
    report = compare_folders(dense, moe, tokens, gradients=arguments.gradients, trust_remote_code=trust)
    print(describe_equivalence(report), file=stream_beside(arguments.json))
    write_json(arguments.json, equivalence_figures(report))
    return 0 if report.agrees else 1


def _check(arguments: argparse.Namespace, data: DataConfig) -> list[Mistake]:
    from recipes.data.sources import check_paths
    from recipes.data.tokenizer import check_tokenizer
    from recipes.models.hf.inspection import check_checkpoint

    mistakes = check_json_target(arguments.json) + check_paths(data, "--text")
    for option in ("dense", "moe"):
        folder, trust = getattr(arguments, option), arguments.trust_remote_code
        mistakes += check_checkpoint(folder, f"--{option}", trust_remote_code=trust)
    if not mistakes:
        trust = arguments.trust_remote_code
        mistakes += check_tokenizer(arguments.dense, where="--dense", trust_remote_code=trust)
        mistakes += _check_length(arguments)
    return mistakes + check_least(arguments, samples=1, sequence_length=1)


def _check_length(arguments: argparse.Namespace) -> list[Mistake]:
    from recipes.models.hf.config_file import context_length, read_config

    context = context_length(read_config(Path(arguments.dense).expanduser()))
    if context is None or arguments.sequence_length <= context:
        return []
    rule = f"the dense model takes {context} tokens at most"
    return [Mistake("--sequence-length", arguments.sequence_length, rule, f"Give {context} or less.")]


def describe_equivalence(report: EquivalenceReport) -> str:
    """Describes the figures for people."""
    drift = report.logits
    verdict = "the same function" if report.agrees else "NOT the same function"
    lines = [
        f"{report.tokens} tokens: {verdict}, as far as {str(report.dtype).removeprefix('torch.')} can tell",
        f"logits differ by {drift.max_diff:.2e}, {drift.relative:.1e} of the largest; KL {drift.kl:.1e}; "
        f"{drift.argmax_agreement:.2%} of the most likely tokens agree",
        f"the dense model was loaded by {report.loader}",
    ]
    if report.gradients is not None:
        worst = list(report.gradients.items())[:3]
        named = ", ".join(f"{name} by {value:.1e}" for name, value in worst)
        lines.append(f"gradients of {len(report.gradients)} shared parameters; most differ {named}")
    return "\n".join(lines)


def equivalence_figures(report: EquivalenceReport) -> dict[str, Any]:
    """Returns the figures for programs."""
    return {
        "agrees": report.agrees,
        "dtype": str(report.dtype).removeprefix("torch."),
        "tokens": report.tokens,
        "loader": report.loader,
        "relative": report.logits.relative,
        "kl": report.logits.kl,
        "argmax_agreement": report.logits.argmax_agreement,
        "gradients": report.gradients,
    }


if __name__ == "__main__":
    run_command(main)
