"""Makes a mixture of experts dense: ``python -m tools.densify MODEL --out DIR``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe.registry import declared_names
from tools.command import log_beside, run_command, stream_beside, tool_parser, write_json
from tools.mixture_flags import add_mixture_flags, add_text_flags, read_source

if TYPE_CHECKING:
    from recipes.upcycling.densify.densify_mixture import Densified


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "densify",
        "Makes a mixture the dense class of its family: each layer's network is the mean of its experts, "
        "once their neurons are in one order. Every other tensor has the source's bytes. The whole mixture "
        "is held in memory in fp32 while it looks at text.",
        example="MIXTURE --text calibration.jsonl --out DENSE",
    )
    add_mixture_flags(parser, keeps=False)
    parser.add_argument(
        "--method",
        choices=declared_names("recipes.upcycling.densify.shares"),
        default="average",
        help="average: every expert counts the same; frequency: as often as tokens are routed to it "
        "(default average)",
    )
    add_text_flags(parser)
    return parser.parse_args()


def main() -> int:
    """Checks the flags, makes it dense, and says what it costs."""
    arguments = _parse()
    source, cache, out = read_source(arguments)
    from recipes.upcycling.densify.densify_mixture import densify

    found = densify(source, arguments.method, cache, out, log_beside(arguments.json))
    print(_words(found, arguments.method), file=stream_beside(arguments.json))
    write_json(
        arguments.json,
        {
            "out": str(found.out),
            "class": found.architecture,
            "method": arguments.method,
            "weight_sum": found.weight_sums,
            "residual": {index: row[0] for index, row in found.residuals.items()},
            "residual_in_order": {index: row[1] for index, row in found.residuals.items()},
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
            "bytes": found.total_bytes,
        },
    )
    return 0


def _words(found: Densified, method: str) -> str:
    """Returns a line for each layer, and what it costs."""
    lines = [f"{'layer':>6}  weights' sum  experts apart  once in one order"]
    for index, (before, after) in found.residuals.items():
        lines.append(f"{index:>6}{found.weight_sums[index]:>14.4f}{before:>15.4f}{after:>19.4f}")
    lines.append(
        f"{found.architecture} by {method} in {found.out}, {found.total_bytes / 2**30:.2f} GiB; held-out "
        f"loss {found.loss_before:.4f} -> {found.loss_after:.4f} nats a token; reloaded by its own class, it "
        "computes the same"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
