"""Times every router alone and in a training step: ``python -m tools.bench_routers --help``."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from typing import TYPE_CHECKING, Any

from tools.command import (
    check_json_target,
    check_least,
    check_positive,
    machine_figures,
    run_command,
    tool_parser,
    write_json,
)

if TYPE_CHECKING:
    from moe.errors import Mistake

_GRID_DEFAULT = ("every choice of conf/router", "ssr[probability=1]", "transport solvers")
_STEP_DEFAULT = [
    "topk",
    "topk[balance_coef=0,z_coef=0]",
    "ssr[probability=0.001]",
    "ssr[probability=1]",
    "sinkhorn",
    "s_base",
    "base_layers",
    "comet",
]
#: A step under SSR may cost 2 % more than one under plain top-k.
_BOUND = 1.02


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "bench_routers",
        "Measures the cost of routers: forward and backward of each alone, over tokens and experts; "
        "with --step, a whole training step of a small MoE decoder in which only the router differs. "
        "All run in one process, interleaved in random order. Cases too long or too large are "
        "reported with the estimate that excluded them.",
        epilog="Routers are choices of conf/router with options of their own: topk 'ssr[probability=0.001]' "
        "'sinkhorn[top_k=1,tolerance=1e-3]'; and solver:sinkhorn, solver:sns_cg, solver:sns_schur, the "
        "transport solvers alone.",
        example="--routers topk sinkhorn --experts 8 64 --tokens 4096",
    )
    add = parser.add_argument
    add("--step", action="store_true", help="measure training steps, not routers alone")
    add("--routers", nargs="+", metavar="ROUTER", help=f"default: {', '.join(_GRID_DEFAULT)}")
    add("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536], metavar="T")
    add("--experts", nargs="+", type=int, default=[8, 64, 512], metavar="E")
    add("--width", type=int, default=256, help="model width")
    add("--skewed", action="store_true", help="use logits of a trained router without balance (grid only)")
    add("--rounds", type=int, default=15, help="most timed rounds")
    add("--seconds", type=float, default=10.0, help="most seconds of a router at one shape")
    add("--memory-mib", type=float, help="most memory of a pass (default: half of what is free)")
    add("--threads", type=int, help="CPU threads (default: torch's own)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def _mistakes(arguments: argparse.Namespace) -> list[Mistake]:
    import torch

    from moe.errors import Mistake

    mistakes = check_json_target(arguments.json)
    numbers = {"--tokens": arguments.tokens, "--experts": arguments.experts}
    for flag, values in numbers.items():
        mistakes += [Mistake(flag, v, "it must be 1 or more", "Raise it.") for v in values if v < 1]
    mistakes += check_least(arguments, width=1, rounds=1, threads=1)
    mistakes += check_positive(arguments, "seconds", "memory_mib")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        mistakes.append(Mistake("--device", "cuda", "this torch sees no GPU", "Leave it out."))
    return mistakes


def _default_labels(step: bool) -> list[str]:
    from recipes.studies.benchmarks.router_candidates import SOLVERS
    from recipes.studies.option_lists import conf_choices

    if step:
        return list(_STEP_DEFAULT)
    choices = conf_choices("router")
    # The baseline comes first.
    choices.sort(key=lambda name: (name != "topk", name))
    return [*choices, "ssr[probability=1]", *SOLVERS]


def _machine(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch

    name = {"machine": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        **machine_figures(),
        **name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": arguments.device,
        "dtype": "float32",
    }


def _measure_grid(arguments: argparse.Namespace, candidates: Any, device: Any) -> dict[str, Any]:
    from recipes.studies.benchmarks.router_candidates import Shape
    from recipes.studies.benchmarks.router_grid import Grid, Limits, memory_allowance, render

    allowed = memory_allowance(device) if arguments.memory_mib is None else arguments.memory_mib * 2**20
    grid = Grid(candidates, Limits(arguments.rounds, arguments.seconds, allowed), device)
    cells = []
    for experts in sorted(set(arguments.experts)):
        for tokens in sorted(set(arguments.tokens)):
            found = grid.measure(Shape(tokens, experts, arguments.width, arguments.skewed))
            print(f"\n{render(found, grid.baseline)}", flush=True)
            cells += [dataclasses.asdict(cell) for cell in found]
    limits = {"rounds": arguments.rounds, "seconds": arguments.seconds, "bytes": allowed}
    return {
        "width": arguments.width,
        "skewed": arguments.skewed,
        "baseline": grid.baseline,
        "limits": limits,
        "cells": cells,
    }


def _measure_steps(arguments: argparse.Namespace, candidates: Any, device: Any) -> dict[str, Any]:
    import transformers

    from recipes.studies.benchmarks.router_step import (
        STEP_SHAPES,
        expected_costs,
        measure_steps,
        render_steps,
    )

    transformers.logging.set_verbosity_error()
    figures: dict[str, Any] = {"transformers": transformers.__version__, "bound": _BOUND, "shapes": {}}
    for shape in STEP_SHAPES:
        steps = measure_steps(candidates, shape, arguments.rounds, device)
        expected = expected_costs(candidates, steps)
        label = f"{shape.num_experts} experts, F={shape.expert_width}"
        batch = f"{shape.batch_size}x{shape.seq_len} tokens, {shape.num_layers} layers"
        print(f"\n{label}, {batch}, forward + backward + AdamW")
        print(render_steps(steps, expected, _BOUND), flush=True)
        figures["shapes"][label] = {
            "steps": [dataclasses.asdict(step) for step in steps],
            "expected": [dataclasses.asdict(mean) for mean in expected],
        }
    return figures


def main() -> int:
    """Measures and prints tables."""
    arguments = _parse()
    import torch

    from moe.errors import ConfigError, UserError
    from recipes.studies.benchmarks.router_candidates import read_candidates

    mistakes = _mistakes(arguments)
    candidates = []
    try:
        candidates = read_candidates(arguments.routers or _default_labels(arguments.step))
    except ConfigError as error:
        mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    figures = _machine(arguments, device)
    print(", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
    measure = _measure_steps if arguments.step else _measure_grid
    figures |= measure(arguments, candidates, device)
    write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    run_command(main)
