"""Stores an MoE as base and deltas: ``python -m tools.ders compress MOE OUT``, ``... expand IN OUT``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, run_command, stream_beside, tool_parser, write_json

if TYPE_CHECKING:
    from moe.experts.deltas import DeltaCodec


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "ders",
        "DeRS (arXiv 2503.01359): experts that came from one network are stored as their mean "
        "and the differences from it, in a few bits or as one of ten elements. Exact for copies before "
        "training, lossy after it: compare the expanded folder by tools.verify before you delete anything.",
        example="compress MOE SMALL --bits 2",
    )
    add = parser.add_argument
    add("action", choices=("compress", "expand"))
    add("source", metavar="SOURCE", help="an MoE; or, to expand, a compressed one")
    add("out", metavar="OUT", help="the result; must not exist")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--bits", type=int, help="1, 2, 4 or 8 bits for each difference (default: 2)")
    kind.add_argument("--one-of", type=int, metavar="B", help="keep one of B differences, drawn at random")
    add("--rescale", action="store_true", help="with --one-of: multiply the kept differences by B")
    add("--seed", type=int, default=0, help="seed of the draw of --one-of")
    return parser.parse_args()


def main() -> int:
    """Checks the flags, then compresses or expands."""
    arguments = _parse()
    mistakes = _check(arguments)
    if mistakes:
        raise ConfigError(mistakes)
    from tqdm import tqdm

    from recipes.models.ders.delta_store import compress, expand

    source, out = (Path(path).expanduser().absolute() for path in (arguments.source, arguments.out))
    stream = stream_beside(arguments.json)
    # Files get no bar.
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=arguments.action, disable=None) as bar:
        if arguments.action == "expand":
            figures = {"bytes": expand(source, out, bar.update)}
            text = f"wrote {figures['bytes'] / 2**20:.1f} MiB: {out}"
        else:
            found = compress(source, out, _codec(arguments), bar.update)
            figures = asdict(found)
            text = (
                f"{found.source_bytes / 2**20:.1f} MiB became {found.stored_bytes / 2**20:.1f} MiB: {out}\n"
                f"experts of {found.groups} matrices: {found.delta_share:.1e} of their weight sets them "
                f"apart, and expanded they are wrong by {found.relative_error:.1e} of it"
            )
    print(text, file=stream)
    write_json(arguments.json, figures)
    return 0


def _check(arguments: argparse.Namespace) -> list[Mistake]:
    mistakes = check_json_target(arguments.json)
    if not Path(arguments.source).expanduser().is_dir():
        mistakes.append(Mistake("SOURCE", arguments.source, "there is no such folder", "Give a checkpoint."))
    if Path(arguments.out).expanduser().exists():
        mistakes.append(Mistake("OUT", arguments.out, "it exists already", "Give another, or delete it."))
    if arguments.bits not in (None, 1, 2, 4, 8):
        mistakes.append(Mistake("--bits", arguments.bits, "it must be 1, 2, 4 or 8", "Choose 2."))
    if arguments.one_of is not None and arguments.one_of < 1:
        mistakes.append(Mistake("--one-of", arguments.one_of, "it must be at least 1", "Choose 10."))
    if arguments.rescale and arguments.one_of is None:
        mistakes.append(Mistake("--rescale", True, "it goes with --one-of", "Give both, or neither."))
    return mistakes


def _codec(arguments: argparse.Namespace) -> DeltaCodec:
    from moe.experts.deltas import QuantisedDelta, SparseDelta

    if arguments.one_of is not None:
        return SparseDelta(arguments.one_of, arguments.rescale, arguments.seed)
    return QuantisedDelta(arguments.bits or 2)


if __name__ == "__main__":
    run_command(main)
