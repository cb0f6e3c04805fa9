"""Prunes a mixture of experts: ``python -m tools.prune MODEL --keep 32 --out DIR``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from moe.registry import declared_names
from tools.command import (
    check_existing_folder,
    check_json_target,
    check_least,
    log_beside,
    run_command,
    stream_beside,
    tool_parser,
    write_json,
)

if TYPE_CHECKING:
    from recipes.data.config import DataConfig
    from recipes.upcycling.prune.prune_mixture import Pruned
    from recipes.upcycling.reduce.text_look import TextRequest


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "prune",
        "Leaves each MoE layer the experts that text needs most, without training, in the class that the "
        "model has. Every tensor that stays has the source's bytes. The whole mixture is held in memory in "
        "fp32 while it looks at text.",
        example="MIXTURE --keep 4 --text calibration.jsonl --out PRUNED",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the mixture: docs/continue.md lists the families")
    add("--keep", type=int, required=True, metavar="E", help="experts that each layer keeps")
    add("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    add(
        "--method",
        choices=declared_names("recipes.upcycling.prune.criteria"),
        default="reap",
        help="reap: mean of weight times output norm over an expert's own tokens; ean: sum of output norms; "
        "usage: number of tokens; random (default reap)",
    )
    add("--seed", type=int, default=0, help="seed of --method random")
    add_text_flags(parser)
    return parser.parse_args()


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the text that a mixture reads, as all tools have them that leave fewer experts."""
    add = parser.add_argument
    add("--text", metavar="PATH", help="text to look at; a part is held out (default: Python's library)")
    add("--samples", type=int, default=64, metavar="N", help="samples to look at (default 64)")
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of a sample (default 256)")
    add("--trust-remote-code", action="store_true", help="run code that the folder brings (auto_map)")


def read_source(arguments: argparse.Namespace, **least: float) -> tuple[TextRequest, Path, Path]:
    """Checks the flags of a mixture, its text and the output; returns the request, token cache and output.

    Args:
        arguments: The flags.
        least: Minimum of further ones.

    Raises:
        ConfigError: Some are wrong.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from recipes.data.config import DataConfig

    data = DataConfig(path=arguments.text, seq_len=max(1, arguments.sequence_length))
    if mistakes := _check(arguments, data, least):
        raise ConfigError(mistakes)
    from recipes.models.export.output_folder import refuse_existing
    from recipes.upcycling.reduce.text_look import TextRequest

    out = Path(arguments.out).expanduser()
    refuse_existing(out, "--out")
    model = Path(arguments.model).expanduser()
    cache = Path(os.environ.get("GRAFT_CACHE", "~/.cache/graft")).expanduser() / "tokens"
    return TextRequest(model, data, arguments.samples, arguments.trust_remote_code), cache, out


def main() -> int:
    """Checks the flags, prunes, and says what it costs."""
    arguments = _parse()
    source, cache, out = read_source(arguments, keep=1)
    from recipes.upcycling.prune.prune_mixture import PruneRequest, prune

    request = PruneRequest(source, arguments.keep, arguments.method, arguments.seed)
    found = prune(request, cache, out, log_beside(arguments.json))
    print(_words(found, arguments.method), file=stream_beside(arguments.json))
    write_json(
        arguments.json,
        {
            "out": str(found.out),
            "method": arguments.method,
            "experts_before": found.num_experts,
            "experts": arguments.keep,
            "kept": found.kept,
            "share_of_choices": found.share,
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
            "bytes": found.total_bytes,
        },
    )
    return 0


def _check(arguments: argparse.Namespace, data: DataConfig, least: dict[str, float]) -> list[Mistake]:
    from recipes.data.sources import check_paths
    from recipes.models.hf.inspection import check_checkpoint

    mistakes = check_json_target(arguments.json) + check_paths(data, "--text")
    mistakes += check_existing_folder("MODEL", arguments.model)
    if not mistakes:
        mistakes += check_checkpoint(arguments.model, "MODEL", trust_remote_code=arguments.trust_remote_code)
    return mistakes + check_least(arguments, **least, samples=1, sequence_length=1)


def _words(found: Pruned, method: str) -> str:
    """Returns a line for each layer, and what it costs."""
    lines = [f"{'layer':>6}  choices kept  experts kept"]
    for index, row in found.kept.items():
        shown = ", ".join(map(str, row[:12])) + (", ..." if len(row) > 12 else "")
        lines.append(f"{index:>6}{found.share[index]:>14.1%}  {shown}")
    kept = len(next(iter(found.kept.values())))
    lines.append(
        f"{kept} of {found.num_experts} experts by {method} in {found.out}, "
        f"{found.total_bytes / 2**30:.2f} GiB; held-out loss {found.loss_before:.4f} -> "
        f"{found.loss_after:.4f} nats a token; reloaded by its own class, it computes the same"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
