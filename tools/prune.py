"""Prunes a mixture of experts: ``python -m tools.prune MODEL --keep 32 --out DIR``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe.registry import declared_names
from tools.command import log_beside, run_command, stream_beside, tool_parser, write_json
from tools.mixture_flags import add_mixture_flags, add_text_flags, read_source

if TYPE_CHECKING:
    from recipes.upcycling.prune.prune_mixture import Pruned


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "prune",
        "Leaves each MoE layer the experts that text needs most, without training, in the class that the "
        "model has. Every tensor that stays has the source's bytes. The whole mixture is held in memory in "
        "fp32 while it looks at text.",
        example="MIXTURE --keep 4 --text calibration.jsonl --out PRUNED",
    )
    add_mixture_flags(parser)
    parser.add_argument(
        "--method",
        choices=declared_names("recipes.upcycling.prune.criteria"),
        default="reap",
        help="reap: mean of weight times output norm over an expert's own tokens; ean: sum of output norms; "
        "usage: number of tokens; random (default reap)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --method random")
    add_text_flags(parser)
    return parser.parse_args()


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
