"""Times the experts of a layer by back end: checked against fp64 first, then interleaved in one process.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import ExpertTensors, Workload
from kernels.bench_shapes import H200, Roof, Shape, expert_ids, floor_seconds
from kernels.expert_mlp import BACKENDS, choose_backend, expert_mlp
from kernels.plan import RowPlan, make_plan
from kernels.timing import Timing, interleave, summarise

# Enough tokens to meet most experts, few enough for fp64.
_CHECKED_TOKENS = 128
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        shape: The layer.
        tokens: T.
        routing: One of `kernels.bench_shapes.ROUTINGS`.
        dtype: Of tokens and experts.
        device: Where it runs.
    """

    shape: Shape
    tokens: int
    routing: str
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Result:
    """What was measured of one back end in one case and pass.

    Attributes:
        backend: Its name.
        is_auto: Whether ``auto`` picks it here.
        passes: ``forward`` or ``forward+backward``.
        seconds: Median and spread; None when it was not timed.
        error: Of the output against fp64, relative, in the L2 norm; None when it did not run.
        tflops: Per second, by 6 or 18 T K D F operations.
        floor_share: Least time of the roof over the time measured; None on a CPU.
        saved_bytes: What one forward pass keeps for backward, besides x and the weights.
        peak_bytes: Allocated at most beyond what the case holds; None on a CPU.
        why_not: Why it was not timed, or an empty string.
    """

    backend: str
    is_auto: bool
    passes: str
    seconds: Timing | None = None
    error: float | None = None
    tflops: float | None = None
    floor_share: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    why_not: str = ""


@dataclass(frozen=True)
class _Layer:
    """The tensors of a case."""

    case: Case
    x_TD: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    experts: ExpertTensors
    grad_TD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_TD, self.weights_TK, self.experts.w_up_EUD, self.experts.w_down_EDF

    def plan(self, tokens: int) -> RowPlan:
        return make_plan(self.ids_TK[:tokens], self.case.shape.experts)


def _make(case: Case) -> _Layer:
    s = case.shape
    g = torch.Generator(case.device).manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        value = torch.empty(size, dtype=case.dtype, device=case.device).normal_(std=std, generator=g)
        return value.requires_grad_()

    ids_TK = expert_ids(s, case.tokens, case.routing).to(case.device)
    weights_TK = torch.rand(case.tokens, s.slots, device=case.device, generator=g).requires_grad_()
    up = normal(s.experts, 2 * s.expert_width, s.width, std=s.width**-0.5)
    down = normal(s.experts, s.width, s.expert_width, std=s.expert_width**-0.5)
    x_TD = normal(case.tokens, s.width, std=1.0)
    grad_TD = normal(case.tokens, s.width, std=1.0).detach()
    return _Layer(case, x_TD, weights_TK, ids_TK, ExpertTensors(up, down, "silu", True), grad_TD)


@torch.no_grad()
def _reference(layer: _Layer, tokens: int) -> Tensor:
    """The first tokens in fp64, one expert after the other."""
    out_TD = torch.zeros(tokens, layer.case.shape.width, dtype=torch.float64, device=layer.case.device)
    for e in layer.ids_TK[:tokens].unique().tolist():
        token, slot = (layer.ids_TK[:tokens] == e).nonzero(as_tuple=True)
        h = layer.x_TD[token].double() @ layer.experts.w_up_EUD[e].double().t()
        gate, value = h.chunk(2, dim=1)
        y = (F.silu(gate) * value) @ layer.experts.w_down_EDF[e].double().t()
        out_TD.index_add_(0, token, y * layer.weights_TK[token, slot, None].double())
    return out_TD


def _checked_error(layer: _Layer, name: str) -> float:
    """Relative error of the output on the first tokens.

    Raises:
        RuntimeError: It is above ten rounding steps: what computes something else is not timed.
    """
    tokens = min(_CHECKED_TOKENS, layer.case.tokens)
    expected_TD = _reference(layer, tokens)
    with torch.no_grad():
        x_TD, weights_TK = layer.x_TD[:tokens], layer.weights_TK[:tokens]
        out_TD = expert_mlp(x_TD, weights_TK, layer.plan(tokens), layer.experts, BACKENDS[name])
    error = float((out_TD.double() - expected_TD).norm() / expected_TD.norm())
    if not error <= 10 * torch.finfo(layer.case.dtype).eps:
        raise RuntimeError(f"its output is wrong: relative error {error:.1e}")
    return error


def _runner(layer: _Layer, plan: RowPlan, name: str, *, backward: bool) -> Callable[[], object]:
    backend = BACKENDS[name]

    @torch.no_grad()
    def forward() -> object:
        return expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, backend)

    def both() -> object:
        out_TD = expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, backend)
        return torch.autograd.grad(out_TD, layer.leaves, layer.grad_TD)

    return both if backward else forward


def _saved_bytes(layer: _Layer, plan: RowPlan, name: str) -> int:
    index = [value for value in vars(plan).values() if isinstance(value, Tensor)]
    held = {value.untyped_storage().data_ptr() for value in (*layer.leaves, *index)}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out_TD = expert_mlp(layer.x_TD, layer.weights_TK, plan, layer.experts, BACKENDS[name])
    del out_TD
    return sum(kept.values())


def _peak_bytes(device: torch.device, run: Callable[[], object]) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _refusals(case: Case, names: Sequence[str]) -> tuple[Workload, dict[str, str | None]]:
    s = case.shape
    work = Workload(case.device, case.dtype, s.experts, s.width, s.expert_width, "silu", False)
    return work, {name: BACKENDS[name].refusal(work) for name in names}


def measure_layer(
    case: Case, names: Sequence[str], rounds: int, roof: Roof = H200, passes: Sequence[str] = PASSES
) -> list[Result]:
    """Every back end in one case: checked, then timed, those that refuse with their reason.

    Args:
        case: What runs.
        names: Keys of `kernels.expert_mlp.BACKENDS`.
        rounds: Timed rounds of each.
        roof: Of the GPU, for the share of the least time.
        passes: Some of `PASSES`.
    """
    work, why_not = _refusals(case, names)
    auto = choose_backend(work).backend.name
    layer = _make(case)
    plan = layer.plan(case.tokens)
    errors: dict[str, float] = {}
    for name in names:
        if why_not[name] is None:
            try:
                errors[name] = _checked_error(layer, name)
                _runner(layer, plan, name, backward=True)()
            except (RuntimeError, torch.OutOfMemoryError) as failure:
                errors.pop(name, None)
                why_not[name] = str(failure).splitlines()[0]
    results = []
    for which in passes:
        runners = {n: _runner(layer, plan, n, backward=which != "forward") for n in errors}
        seconds = _time(runners, rounds, case.device)
        for name in names:
            if name not in errors:
                results.append(Result(name, name == auto, which, why_not=why_not[name] or ""))
                continue
            timing = summarise(seconds[name])
            results.append(_result(layer, plan, name, auto, which, timing, errors[name], runners[name], roof))
    return results


def _result(
    layer: _Layer,
    plan: RowPlan,
    name: str,
    auto: str,
    which: str,
    timing: Timing,
    error: float,
    run: Callable[[], object],
    roof: Roof,
) -> Result:
    case = layer.case
    s, backward = case.shape, which != "forward"
    operations = (18 if backward else 6) * case.tokens * s.slots * s.width * s.expert_width
    floor = floor_seconds(s, case.tokens, roof, backward=backward)
    return Result(
        backend=name,
        is_auto=name == auto,
        passes=which,
        seconds=timing,
        error=error,
        tflops=operations / timing.median / 1e12,
        floor_share=floor / timing.median if case.device.type == "cuda" else None,
        saved_bytes=_saved_bytes(layer, plan, name) if backward else None,
        peak_bytes=_peak_bytes(case.device, run),
    )


def _time(
    runners: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    if device.type == "cuda":
        return interleave(runners, rounds, synchronise=lambda: torch.cuda.synchronize(device))
    return interleave(runners, rounds)
