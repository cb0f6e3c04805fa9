"""Which candidate blocks are fastest for a kernel and a shape: the choice, and its measurement on a GPU.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.bench.bench_device import ColdTimer
from kernels.bench.timing import interleave
from kernels.plan.row_plan import make_plan
from kernels.triton.triton_blocks import Blocks, Target, bucket, candidates, row_height

# Another candidate replaces the table's where it takes this share of its time at most: less is noise.
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
        kind: A key of `kernels.triton.triton_blocks.KINDS`.
        height: Rows of a tile, 0 for ``dw``.
        columns: Width of the output.
        depth: Length of the sum; of ``dw`` the height of the output.
    """

    name: str
    kind: str
    height: int
    columns: int
    depth: int

    @property
    def bucket(self) -> str:
        """What its tuned blocks are found by."""
        return bucket(self.kind, self.height, self.columns, self.depth)


@dataclass(frozen=True)
class Tuning:
    """What was found for a case.

    Attributes:
        case: Of a layer.
        blocks: The fastest.
        seconds: Median of every candidate that ran; the first is the table's.
        failed: Why others did not.
    """

    case: Case
    blocks: Blocks
    seconds: Mapping[Blocks, float]
    failed: Mapping[Blocks, str]


#: Seconds of the rounds of a case, by candidate, and why a candidate does not run.
Timer = Callable[[Case, Sequence[Blocks]], tuple[Mapping[Blocks, Sequence[float]], Mapping[Blocks, str]]]


def cases(layer: Layer, target: Target) -> tuple[Case, ...]:
    """The launches of a training step of a layer, one of each bucket."""
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
    """Times the candidates of a case and takes the fastest; the table's where no other is clearly faster.

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
    """Times candidates on a GPU, interleaved, each run with a cold L2 cache, on a balanced random routing."""

    def __init__(self, layer: Layer, target: Target, device: torch.device, rounds: int) -> None:
        """Makes the tensors of a layer."""
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
            # Triton has no common class for what does not fit.
            except Exception as failure:
                failed[blocks] = f"{type(failure).__name__}: {failure}"
                continue
            runs[str(blocks)] = run
        found = interleave(runs, self.rounds, measure=ColdTimer(self.device))
        return {blocks: found[str(blocks)] for blocks in known if str(blocks) in found}, failed

    def _tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.target.dtype, device=self.device) * shape[-1] ** -0.5

    def run_of(self, case: Case, target: Target) -> Callable[[], object]:
        """The launch of a case, with the blocks of a target."""
        launch = importlib.import_module("kernels.triton.triton_launch")
        back = importlib.import_module("kernels.triton.triton_launch_backward")
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
            return lambda: back.down_backward(grad, w, None, self.weights_TK, *index, tiles, h, gating)
        rows, tokens = self._tensor(R, case.depth if case.name == "dw_up" else F), self._tensor(T, D)
        sides = [launch.Side(rows, False), launch.Side(tokens, True)]
        left, right = sides if case.name == "dw_up" else reversed(sides)
        out = self._tensor(E, case.depth, case.columns)

        def write() -> Tensor:
            back.weight_gradient(left, right, plan.token_R, tiles, out)
            return out

        return write
