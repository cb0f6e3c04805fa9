"""Times a training step of an MoE against a dense model: ``python -m tools.bench_step --help``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from tools.command import (
    check_json_target,
    check_least,
    machine_figures,
    run_command,
    tool_parser,
    write_json,
)


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "bench_step",
        "The MoE tax: time of a training step of an MoE over that of a dense Llama with "
        "the same active parameters. All run in one process, interleaved in random order; "
        "logits are compared first.",
        example="--rounds 5 --threads 1 --backend cpu",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=15, help="timed rounds of each")
    add("--threads", type=int, help="CPU threads (default: torch's own)")
    add("--backend", default="auto", help="back end of our experts")
    return parser.parse_args()


def main() -> int:
    """Measures the shapes of the speed goal and prints a table."""
    arguments = _parse()
    import torch
    import transformers

    from kernels.expert_mlp import BACKENDS
    from moe.errors import Mistake, UserError
    from recipes.studies.benchmarks.moe_tax import GOALS, measure_step

    mistakes = check_json_target(arguments.json)
    mistakes += check_least(arguments, rounds=1, threads=1)
    if arguments.backend not in ("auto", *BACKENDS):
        remedy = f"Choose auto, {', '.join(BACKENDS)}."
        mistakes.append(Mistake("--backend", arguments.backend, "there is no such back end", remedy))
    if mistakes:
        raise UserError(mistakes)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    figures: dict[str, Any] = {
        "machine": machine_figures()["machine"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shapes": {},
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {figures['threads']} threads, fp32")
    for shape in GOALS:
        rows = figures["shapes"][shape.label] = {}
        for with_optimizer in (False, True):
            what = "forward + backward + AdamW" if with_optimizer else "forward + backward"
            results = measure_step(shape, arguments.rounds, arguments.backend, with_optimizer=with_optimizer)
            print(f"\n{shape.label}, {shape.batch_size}x{shape.seq_len} tokens, {what}")
            print(f"  {'':26}{'ms':>8}{'p10':>8}{'p90':>8}{'tax':>8}{'p10':>8}{'p90':>8}{'logits':>10}")
            for result in results:
                s, t = result.seconds, result.tax
                error = "" if result.logit_error is None else f"{result.logit_error:.0e}"
                print(
                    f"  {result.model:26}{1e3 * s.median:8.1f}{1e3 * s.p10:8.1f}{1e3 * s.p90:8.1f}"
                    f"{t.median:8.2f}{t.p10:8.2f}{t.p90:8.2f}{error:>10}"
                )
            rows[what] = [dataclasses.asdict(result) for result in results]
    write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    run_command(main)
