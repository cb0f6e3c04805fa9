"""Measures the memory of each rank while an MoE is made: ``python -m tools.bench_sharded --help``."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from moe.errors import Mistake, UserError
from tools.command import (
    check_existing_folder,
    check_json_target,
    machine_figures,
    read_numbers,
    run_command,
    tool_parser,
    write_json,
)

_CLEAR = Path("/proc/self/clear_refs")


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "bench_sharded",
        "Makes MoEs from random Llamas (bf16 files, fp32 weights), each rank its own shard, and "
        "prints the most memory of any rank, beyond libraries, against its shard, what the engine keeps "
        "besides (gradient buffers) and one layer.",
        example="--ranks 1,2 --engine native --json shards.json",
    )
    add = parser.add_argument
    add("--folder", metavar="DIR", help="where to work (default: the system's temporary one)")
    add("--sizes", type=int, default=3, metavar="N", help="the smallest N of three sizes")
    add("--ranks", default="1,2,4", help="numbers of ranks")
    add("--experts", type=int, default=8, help="experts of each layer")
    add("--method", default="copy", help="an upcycling method that needs no options")
    add(
        "--whole",
        type=int,
        default=0,
        metavar="N",
        help="for the smallest N sizes also make it whole on each rank first",
    )
    add("--engine", default="native", metavar="NAME", help="native, deepspeed or megatron")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the engine, as zero_stage=3 or tensor_parallel=2; may be repeated",
    )
    return parser.parse_args()


def _mistakes(arguments: argparse.Namespace) -> list[Mistake]:
    mistakes = check_json_target(arguments.json)
    mistakes += check_existing_folder("--folder", arguments.folder)
    mistakes += read_numbers("--ranks", arguments.ranks)[1]
    mistakes += _engine_mistakes(arguments)
    if not os.access(_CLEAR, os.W_OK):
        rule = "the peak of a process is measured by Linux alone"
        mistakes.append(Mistake(str(_CLEAR), "missing", rule, "Run it on Linux."))
    return mistakes


def _engine_mistakes(arguments: argparse.Namespace) -> list[Mistake]:
    """Checks that the engine exists and takes the options."""
    from recipes.engines import engine_classes

    classes = engine_classes()
    if arguments.engine not in classes:
        rule, remedy = "no engine has this name", f"Choose one of {', '.join(classes)}."
        return [Mistake("--engine", arguments.engine, rule, remedy)]
    names = {field.name for field in fields(classes[arguments.engine].config_class)}
    rule = f"it must be an option of the engine {arguments.engine} with a value"
    remedy = f"Give KEY=VALUE, the key one of {', '.join(sorted(names - {'name', 'expert_parallel'}))}."
    wrong = [o for o in arguments.option if o.partition("=")[0] not in names or "=" not in o]
    return [Mistake("--option", option, rule, remedy) for option in wrong]


def _layouts(arguments: argparse.Namespace) -> list[Any]:
    """Returns the layouts of ranks and experts that the engine supports."""
    from recipes.engines import engine_classes
    from recipes.studies.benchmarks.shard_memory import Layout

    kind, parts = engine_classes()[arguments.engine], [o.partition("=") for o in arguments.option]
    given = {"engine": arguments.engine, "options": tuple((key, yaml.safe_load(v)) for key, _, v in parts)}
    found = []
    for ranks in read_numbers("--ranks", arguments.ranks)[0]:
        widths = [ep for ep in (2, 4, 8) if ranks % ep == 0 and arguments.experts % ep == 0]
        every = [Layout(ranks, ep, **given) for ep in (1, *widths)]
        every = [one for one in every if kind.config_class(**one.fields).check(ranks) is None]
        found += [*every, Layout(ranks, whole=True, **given)] if every else []
    return found


def main() -> int:
    """Measures every size and layout, and prints the table."""
    arguments = _parse()
    if mistakes := _mistakes(arguments):
        raise UserError(mistakes)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from recipes.studies.benchmarks.shard_memory import SIZES, measure_layout, write_dense

    sizes, layouts = SIZES[: arguments.sizes], _layouts(arguments)
    engine = " ".join([arguments.engine, *arguments.option])
    print(f"{engine}: {arguments.method}, {arguments.experts} experts, fp32; MiB, the most of any rank")
    print(_HEAD)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tiny, folders = write_dense(sizes, Path(folder))
        for number, dense in enumerate(folders):
            for layout in layouts:
                if layout.whole and number >= arguments.whole:
                    continue
                found = measure_layout(dense, tiny, layout, arguments.method, arguments.experts)
                rows.append(asdict(layout) | {"by_rank": [asdict(rank) for rank in found]})
                print(_line(rows[-1]), flush=True)
    write_json(arguments.json, machine_figures() | {"method": arguments.method, "rows": rows})
    return 0


_HEAD = (
    f"{'dense':>7}{'moe':>9}{'layer':>7}{'ranks':>7}{'EP':>4}{'shard':>8}{'besides':>9}{'+layer':>8}"
    f"{'making':>8}{'check':>8}{'read':>8}"
)


def _line(row: dict[str, Any]) -> str:
    def most(key: str) -> float | None:
        values = [rank[key] for rank in row["by_rank"]]
        return None if None in values else max(values) / 2**20

    def shown(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.0f}"

    parts = ("shard", "besides", "layer")
    bound = max(sum(rank[part] for part in parts) for rank in row["by_rank"]) / 2**20
    ep = "-" if row["whole"] else str(row["expert_parallel"])
    line = f"{shown(most('dense'), 7)}{shown(most('moe'), 9)}{shown(most('layer'), 7)}{row['ranks']:>7}"
    line += f"{ep:>4}{shown(most('shard'), 8)}{shown(most('besides'), 9)}{bound:8.0f}"
    line += "".join(shown(most(key), 8) for key in ("making", "check", "read"))
    return line + ("  whole on each rank first" if row["whole"] else "")


if __name__ == "__main__":
    run_command(main)
