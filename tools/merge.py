"""Merges experts of a mixture: ``python -m tools.merge MODEL --keep 4 --out DIR``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe.registry import declared_names
from tools.command import log_beside, run_command, stream_beside, tool_parser, write_json
from tools.mixture_flags import add_mixture_flags, add_text_flags, read_source

if TYPE_CHECKING:
    from recipes.upcycling.merge.merge_mixture import Merged


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "merge",
        "Leaves each MoE layer the experts that text uses most, each mixed with those that are like it, in "
        "the class that the model has. Of routers their rows stay, and what is outside the experts has the "
        "source's bytes. The whole mixture is held in memory in fp32 while it looks at text.",
        example="MIXTURE --keep 4 --text calibration.jsonl --out MERGED",
    )
    add_mixture_flags(parser)
    parser.add_argument(
        "--method",
        choices=declared_names("recipes.upcycling.merge.methods"),
        default="msmoe",
        help="msmoe: joined by router logits over tokens, with neurons in one order; frequency: joined by "
        "router rows, with neurons as they are (default msmoe)",
    )
    add_text_flags(parser)
    return parser.parse_args()


def main() -> int:
    """Checks the flags, merges, and says what it costs."""
    arguments = _parse()
    source, cache, out = read_source(arguments, keep=1)
    from recipes.upcycling.merge.merge_mixture import merge

    found = merge(source, arguments.keep, arguments.method, cache, out, log_beside(arguments.json))
    print(_words(found, arguments.method), file=stream_beside(arguments.json))
    write_json(
        arguments.json,
        {
            "out": str(found.out),
            "method": arguments.method,
            "experts_before": found.num_experts,
            "experts": arguments.keep,
            "groups": found.groups,
            "residual": {index: row[0] for index, row in found.residuals.items()},
            "residual_in_order": {index: row[1] for index, row in found.residuals.items()},
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
            "bytes": found.total_bytes,
        },
    )
    return 0


def _words(found: Merged, method: str) -> str:
    """Returns a line for each layer, and what it costs."""
    lines = [f"{'layer':>6}  experts apart  as mixed  groups, with the expert that stays first"]
    for index, groups in found.groups.items():
        before, after = found.residuals[index]
        shown = " ".join("+".join(map(str, row)) for row in groups[:12]) + (
            " ..." if len(groups) > 12 else ""
        )
        lines.append(f"{index:>6}{before:>15.4f}{after:>10.4f}  {shown}")
    kept = len(next(iter(found.groups.values())))
    lines.append(
        f"{found.num_experts} experts merged into {kept} by {method} in {found.out}, "
        f"{found.total_bytes / 2**30:.2f} GiB; held-out loss {found.loss_before:.4f} -> "
        f"{found.loss_after:.4f} nats a token; reloaded by its own class, it computes the same"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
