"""Measures which blocks of the Triton kernels are fastest on this GPU: ``python -m kernels.tune --help``.

Runs use the results with GRAFT_TUNED_BLOCKS=1; see `kernels.triton.tuned_blocks`. `triton.autotune` cannot
replace it: it tunes inside the training step and on each rank alone, so that results would differ in their
last bits between runs, and its blocks are unknown when tiles are cut and partial sums are allocated.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Workload
from kernels.bench.bench_device import ColdTimer
from kernels.bench.timing import interleave
from kernels.expert_mlp import BACKENDS
from kernels.plan.row_plan import make_plan
from kernels.triton.triton_blocks import Blocks, Target, bucket, candidates, row_height
from kernels.triton.tuned_blocks import DTYPES, VARIABLE, Identity, add, identity_of

# Largest share of the table's time at which other blocks replace it: a smaller gain is noise.
_GAIN = 0.98


@dataclass(frozen=True)
class Layer:
    """A layer whose kernels are tuned; its experts are gated.

    Attributes:
        tokens: T.
        experts: E.
        top_k: K.
        model_width: D.
        expert_width: F.
    """

    tokens: int
    experts: int
    top_k: int
    model_width: int
    expert_width: int


@dataclass(frozen=True)
class Case:
    """One launch of a layer.

    Attributes:
        name: ``up``, ``down``, ``dx``, ``dh``, ``dw_up`` or ``dw_down``.
        kind: A member of `kernels.triton.triton_blocks.KINDS`.
        height: Rows of a tile, 0 for ``dw``.
        columns: Width of the output.
        depth: Length of the sum; height of the output for ``dw``.
    """

    name: str
    kind: str
    height: int
    columns: int
    depth: int

    @property
    def bucket(self) -> str:
        """Key of the tuned blocks; see `kernels.triton.triton_blocks.bucket`."""
        return bucket(self.kind, self.height, self.columns, self.depth)


@dataclass(frozen=True)
class Tuning:
    """Result for one case.

    Attributes:
        case: The launch.
        blocks: The fastest blocks.
        seconds: Median time of every candidate that ran; the first is the table's.
        failed: Why the other candidates did not run.
    """

    case: Case
    blocks: Blocks
    seconds: Mapping[Blocks, float]
    failed: Mapping[Blocks, str]


#: Returns the seconds of the rounds of a case by candidate, and why other candidates do not run.
Timer = Callable[[Case, Sequence[Blocks]], tuple[Mapping[Blocks, Sequence[float]], Mapping[Blocks, str]]]


def cases(layer: Layer, target: Target) -> tuple[Case, ...]:
    """Returns the launches of a layer's training step, one of each bucket."""
    D, F, U = layer.model_width, layer.expert_width, 2 * layer.expert_width
    height = row_height(layer.tokens * layer.top_k, layer.experts, target)
    found = (
        Case("up", "up", height, F, D),
        Case("down", "rows", height, D, F),
        Case("dx", "rows", height, D, U),
        Case("dh", "dh", height, F, D),
        Case("dw_up", "dw", 0, D, U),
        Case("dw_down", "dw", 0, F, D),
    )
    return tuple({case.bucket: case for case in reversed(found)}.values())[::-1]


def choose(case: Case, target: Target, time: Timer) -> Tuning:
    """Times the candidates of a case and takes the fastest, or the table's unless another is clearly faster.

    Raises:
        RuntimeError: The table's own blocks do not run.
    """
    known = candidates(case.kind, case.height, target)
    rounds, failed = time(case, known)
    seconds = {blocks: statistics.median(rounds[blocks]) for blocks in known if blocks in rounds}
    if known[0] not in seconds:
        why = failed.get(known[0], "it was not timed")
        raise RuntimeError(f"{case.name}: the blocks of the table do not run: {why}")
    fastest = min(seconds, key=seconds.__getitem__)
    is_faster = seconds[fastest] <= _GAIN * seconds[known[0]]
    return Tuning(case, fastest if is_faster else known[0], seconds, dict(failed))


class GpuTimer:
    """Timer of candidates on a GPU: interleaved, with a cold L2 cache, on a balanced random routing."""

    def __init__(self, layer: Layer, target: Target, device: torch.device, rounds: int) -> None:
        """Makes the plan and combine weights of a layer.

        Args:
            layer: The layer.
            target: GPU and dtype.
            device: Device of the tensors.
            rounds: Timed runs of each candidate.
        """
        self.layer, self.target, self.device, self.rounds = layer, target, device, rounds
        T, E, K = layer.tokens, layer.experts, layer.top_k
        ids_TK = torch.rand(T, E, device=device).topk(K).indices
        self.plan = make_plan(ids_TK, E)
        self.weights_TK = torch.rand(T, K, device=device)

    def __call__(
        self, case: Case, known: Sequence[Blocks]
    ) -> tuple[dict[Blocks, list[float]], dict[Blocks, str]]:
        """See `Timer`."""
        runs: dict[str, Callable[[], object]] = {}
        failed: dict[Blocks, str] = {}
        for blocks in known:
            run = self.run_of(case, replace(self.target, tuned={case.bucket: blocks}))
            try:
                run()
                torch.cuda.synchronize(self.device)
            # Triton has no common class for blocks that do not fit.
            except Exception as failure:
                failed[blocks] = f"{type(failure).__name__}: {failure}"
                continue
            runs[str(blocks)] = run
        found = interleave(runs, self.rounds, measure=ColdTimer(self.device))
        return {blocks: found[str(blocks)] for blocks in known if str(blocks) in found}, failed

    def _tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.target.dtype, device=self.device) * shape[-1] ** -0.5

    def run_of(self, case: Case, target: Target) -> Callable[[], object]:
        """Returns the launch of a case with the blocks of a target."""
        launch = importlib.import_module("kernels.triton.triton_launch")
        T, E, D, F = (
            getattr(self.layer, name) for name in ("tokens", "experts", "model_width", "expert_width")
        )
        plan, gating, R = self.plan, launch.Gating("silu", True), self.plan.num_rows
        tiles = launch.make_tiles(plan.counts_E, R, target)
        index = plan.token_R, plan.slot_R
        if case.name == "up":
            x, w = self._tensor(T, D), self._tensor(E, 2 * F, D)
            return lambda: launch.up(x, w, None, plan.token_R, tiles, gating, True)
        if case.name in ("down", "dx"):
            a, w = self._tensor(R, case.depth), self._tensor(E, D, F)
            b = w.transpose(1, 2) if case.name == "down" else self._tensor(E, 2 * F, D)
            return lambda: launch.rows_times(a, b, None, tiles)
        if case.name == "dh":
            grad, w, h = self._tensor(T, D), self._tensor(E, D, F), self._tensor(R, 2 * F)
            return lambda: launch.down_backward(grad, w, None, self.weights_TK, *index, tiles, h, gating)
        rows, tokens = self._tensor(R, case.depth if case.name == "dw_up" else F), self._tensor(T, D)
        sides = [launch.Side(rows, False), launch.Side(tokens, True)]
        left, right = sides if case.name == "dw_up" else reversed(sides)
        out = self._tensor(E, case.depth, case.columns)

        def write() -> Tensor:
            launch.weight_gradient(left, right, plan.token_R, tiles, out)
            return out

        return write


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
        layer: The layer.
        dtype: A key of `kernels.triton.tuned_blocks.DTYPES`.
        identity: GPU and software.
        path: The file that results are added to.
        time: Times candidates.
        report: Called with each result.
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
    sizes = {
        "--tokens": "tokens of a micro-batch on one rank",
        "--experts": "experts that one rank holds",
        "--top-k": "experts a token",
        "--model-width": "width of a token",
        "--expert-width": "inner width of an expert",
    }
    for name, text in sizes.items():
        parser.add_argument(name, required=True, type=_positive, metavar="N", help=text)
    rounds = "timed runs of each candidate (default: 20)"
    parser.add_argument("--rounds", default=20, type=_positive, metavar="N", help=rounds)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
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
    unsupported_reason: str | None = "there is no GPU here"
    if torch.cuda.is_available():
        unsupported_reason = BACKENDS["triton"].unsupported_reason(Workload(device, dtype, *widths))
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


if __name__ == "__main__":
    sys.exit(main())
