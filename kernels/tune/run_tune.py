"""Measures which blocks of the Triton kernels are fastest on this GPU: ``python -m kernels.tune --help``.

What it finds is used by runs with GRAFT_TUNED_BLOCKS=1; see `kernels.triton.tuned_blocks`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.backend import Workload
from kernels.expert_mlp import BACKENDS
from kernels.triton.triton_blocks import Target
from kernels.triton.tuned_blocks import DTYPES, VARIABLE, Identity, add, identity_of
from kernels.tune.triton_tune import GpuTimer, Layer, Timer, Tuning, cases, choose


def tune(
    layer: Layer,
    dtype: str,
    identity: Identity,
    path: Path,
    time: Timer,
    report: Callable[[Tuning], object] = lambda tuning: None,
) -> list[Tuning]:
    """Tunes every kernel of a layer; each result is in the file before the next is measured.

    Args:
        layer: Whose kernels.
        dtype: A key of `kernels.triton.tuned_blocks.DTYPES`.
        identity: The GPU.
        path: The file that results are added to.
        time: Times candidates.
        report: Is told of each result.
    """
    target = Target(identity.capability, DTYPES[dtype])
    found = []
    for case in cases(layer, target):
        tuning = choose(case, target, time)
        table = next(iter(tuning.seconds.values()))
        kept = {"microseconds": 1e6 * tuning.seconds[tuning.blocks], "table_microseconds": 1e6 * table}
        add(path, identity, {dtype: {case.bucket: tuning.blocks}}, {dtype: {case.bucket: kept}})
        report(tuning)
        found.append(tuning)
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune",
        description="Times the candidate blocks of each Triton kernel for one layer on this GPU, and keeps "
        f"the fastest in a file. Runs use it with {VARIABLE}=1 (or =PATH).",
    )
    positive = {"type": _positive, "metavar": "N"}
    parser.add_argument("--tokens", required=True, help="tokens of a micro-batch on one rank", **positive)
    parser.add_argument("--experts", required=True, help="experts that one rank holds", **positive)
    parser.add_argument("--top-k", required=True, help="experts a token", **positive)
    parser.add_argument("--model-width", required=True, help="width of a token", **positive)
    parser.add_argument("--expert-width", required=True, help="inner width of an expert", **positive)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", default=20, help="timed runs of each candidate (default: 20)", **positive)
    parser.add_argument("--out", type=Path, metavar="PATH", help="the file (default: in the user's cache)")
    parsed = parser.parse_args(arguments)
    if parsed.top_k > parsed.experts:
        parser.error(f"--top-k {parsed.top_k}: a token cannot use more than the --experts {parsed.experts}")
    return parsed


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _line(tuning: Tuning) -> str:
    table, found = next(iter(tuning.seconds.values())), tuning.seconds[tuning.blocks]
    shape = " ".join(f"{key}={value}" for key, value in asdict(tuning.blocks).items())
    return (
        f"{tuning.case.name:8} {tuning.case.bucket:20} {shape:36} {1e6 * found:9.1f} us, "
        f"{table / found:5.2f} times the table's speed; {len(tuning.seconds)} ran, {len(tuning.failed)} not"
    )


def main(arguments: list[str] | None = None) -> int:
    """Tunes, prints a line a kernel, and returns 2 where no kernel can run."""
    given = _parse(arguments)
    layer = Layer(given.tokens, given.experts, given.top_k, given.model_width, given.expert_width)
    device, dtype = torch.device("cuda", 0), DTYPES[given.dtype]
    widths = (layer.experts, layer.model_width, layer.expert_width, "silu", False)
    unsupported_reason = "there is no GPU here"
    if torch.cuda.is_available():
        unsupported_reason = BACKENDS["triton"].unsupported_reason(Workload(device, dtype, *widths)) or ""
    if unsupported_reason:
        print(f"the Triton kernels cannot be tuned: {unsupported_reason}", file=sys.stderr)
        return 2
    identity = identity_of(device)
    path = given.out or identity.path()
    time = GpuTimer(layer, Target(identity.capability, dtype), device, given.rounds)
    print(f"{identity.gpu}, Triton {identity.triton}, {given.dtype}; medians of {given.rounds} runs")
    tune(layer, given.dtype, identity, path, time, lambda tuning: print(_line(tuning), flush=True))
    print(f"written to {path}; used by runs with {VARIABLE}={1 if given.out is None else path}")
    return 0
