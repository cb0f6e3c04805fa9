"""The obvious computation of the experts, token by token in fp64, and the inputs it is compared on.

Letters: T tokens, D model width, E experts, K slots a token, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank, MainGrads, Workload
from kernels.expert_mlp import BACKENDS, expert_mlp
from kernels.plan.row_plan import make_plan
from kernels.third_party import THIRD_PARTY

#: Everything that carries a gradient, by name.
NAMES = ("x", "weights", "w_up", "w_down", "b_up", "b_down")
#: Low-rank factors: those that the input of a side meets first, and those that make its output.
FACTORS = ("low_a_up", "low_b_up", "low_a_down", "low_b_down")
EVERY = (*NAMES, *FACTORS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

#: Written out, so that nothing is shared with `kernels.activations`.
FORMULAS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "drelu": lambda x: x * (x > 0),
}
#: Those that the value half goes through as well, and that therefore need a gate.
ON_VALUE = frozenset({"drelu"})


@dataclass(frozen=True)
class Sizes:
    """The shape of a case. Widths are multiples of 16 bytes in fp32, which grouped_mm needs."""

    T: int = 13
    K: int = 2
    E: int = 5
    D: int = 8
    F: int = 12
    activation: str = "silu"
    gated: bool = True
    b_up: bool = False
    b_down: bool = False
    rank: int = 0
    scale: float = 0.75


@dataclass(frozen=True)
class Inputs:
    """What the experts are given, and the gradient that comes back from above."""

    sizes: Sizes
    tensors: Mapping[str, Tensor]
    ids_TK: Tensor
    grad_TD: Tensor
    mask_TK: Tensor | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """Rounded to a dtype; combine weights stay fp32 at least, as routers make them."""
        wide = torch.promote_types(dtype, torch.float32)
        kinds = {name: wide if name == "weights" else dtype for name in self.tensors}
        return replace(
            self,
            tensors={name: value.to(device, kinds[name]) for name, value in self.tensors.items()},
            ids_TK=self.ids_TK.to(device),
            grad_TD=self.grad_TD.to(device, dtype),
            mask_TK=None if self.mask_TK is None else self.mask_TK.to(device),
        )


def make_inputs(sizes: Sizes, seed: int = 0) -> Inputs:
    """Random fp64 inputs; ids are uniform, an expert may be empty or chosen twice by a token."""
    g = torch.Generator().manual_seed(seed)
    U = 2 * sizes.F if sizes.gated else sizes.F

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    tensors = {
        "x": normal(sizes.T, sizes.D),
        "weights": torch.rand(sizes.T, sizes.K, generator=g, dtype=torch.float64),
        "w_up": normal(sizes.E, U, sizes.D, std=sizes.D**-0.5),
        "w_down": normal(sizes.E, sizes.D, sizes.F, std=sizes.F**-0.5),
    }
    if sizes.b_up:
        tensors["b_up"] = normal(sizes.E, U)
    if sizes.b_down:
        tensors["b_down"] = normal(sizes.E, sizes.D)
    if sizes.rank:
        tensors["low_a_up"] = normal(sizes.E, sizes.rank, sizes.D, std=sizes.D**-0.5)
        tensors["low_b_up"] = normal(sizes.E, U, sizes.rank, std=sizes.rank**-0.5)
        tensors["low_a_down"] = normal(sizes.E, sizes.rank, sizes.F, std=sizes.F**-0.5)
        tensors["low_b_down"] = normal(sizes.E, sizes.D, sizes.rank, std=sizes.rank**-0.5)
    ids_TK = torch.randint(0, sizes.E, (sizes.T, sizes.K), generator=g)
    return Inputs(sizes, tensors, ids_TK, normal(sizes.T, sizes.D))


def workload(sizes: Sizes, dtype: torch.dtype, device: str = "cpu", *, accumulates: bool = False) -> Workload:
    """What `choose_backend` is asked with for these sizes."""
    return Workload(
        device=torch.device(device),
        dtype=dtype,
        num_experts=sizes.E,
        model_width=sizes.D,
        expert_width=sizes.F,
        activation=sizes.activation,
        has_bias=sizes.b_up or sizes.b_down,
        low_rank=sizes.rank,
        accumulates=accumulates,
        gated=sizes.gated,
    )


def runs(
    name: str, sizes: Sizes, dtypes: Iterable[torch.dtype] = DTYPES, *, accumulates: bool = False
) -> list[tuple[str, torch.dtype]]:
    """Returns the devices and dtypes that a back end of ours supports for these sizes.

    For third parties, which need not keep this contract, see test_kernels_third_party.py.
    """
    if name in THIRD_PARTY:
        return []
    pairs = [(device, dtype) for device in DEVICES for dtype in dtypes]
    return [
        (device, dtype)
        for device, dtype in pairs
        if BACKENDS[name].unsupported_reason(workload(sizes, dtype, device, accumulates=accumulates)) is None
    ]


def widest(name: str, sizes: Sizes, *, accumulates: bool = False) -> list[tuple[str, torch.dtype]]:
    """For each device, the most precise dtype that a back end runs these sizes in."""
    best: dict[str, torch.dtype] = {}
    for device, dtype in runs(name, sizes, accumulates=accumulates):
        best.setdefault(device, dtype)
    return list(best.items())


def call(
    name: str, inputs: Inputs, leaves: Mapping[str, Tensor], main_grads: MainGrads | None = None
) -> Tensor:
    """Runs a back end through the seam."""
    low_rank = None
    if inputs.sizes.rank:
        a_up, b_up, a_down, b_down = (leaves[factor] for factor in FACTORS)
        low_rank = LowRank(a_up, b_up, a_down, b_down, inputs.sizes.scale)
    experts = ExpertTensors(
        w_up_EUD=leaves["w_up"],
        w_down_EDF=leaves["w_down"],
        activation=inputs.sizes.activation,
        gated=inputs.sizes.gated,
        b_up_EU=leaves.get("b_up"),
        b_down_ED=leaves.get("b_down"),
        low_rank=low_rank,
        main_grads=main_grads,
    )
    plan = make_plan(inputs.ids_TK, inputs.sizes.E, inputs.mask_TK)
    return expert_mlp(leaves["x"], leaves["weights"], plan, experts, BACKENDS[name])


def run_backend(name: str, inputs: Inputs, wanted: Iterable[str] = EVERY) -> dict[str, Tensor]:
    """The output as ``out`` and the gradients of the wanted tensors, by name."""
    wanted = [n for n in inputs.tensors if n in set(wanted)]
    leaves = {n: v.detach().requires_grad_(n in wanted) for n, v in inputs.tensors.items()}
    out_TD = call(name, inputs, leaves)
    grads = torch.autograd.grad(out_TD, [leaves[n] for n in wanted], inputs.grad_TD) if wanted else ()
    return {"out": out_TD.detach(), **dict(zip(wanted, grads, strict=True))}


def run_reference(inputs: Inputs) -> dict[str, Tensor]:
    """The same in fp64, one token and one slot after the other, gradients by autograd."""
    double = inputs.to(torch.float64)
    leaves = {n: v.detach().requires_grad_() for n, v in double.tensors.items()}
    per_expert = {n: v.unbind(0) for n, v in leaves.items() if n not in ("x", "weights")}
    rows = [_token(double, leaves, per_expert, t) for t in range(inputs.sizes.T)]
    out_TD = torch.stack(rows) if rows else leaves["x"] * 0
    grads = torch.autograd.grad(
        out_TD, list(leaves.values()), double.grad_TD, allow_unused=True, materialize_grads=True
    )
    return {"out": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def _token(
    inputs: Inputs, leaves: Mapping[str, Tensor], per_expert: Mapping[str, tuple[Tensor, ...]], t: int
) -> Tensor:
    act, F = FORMULAS[inputs.sizes.activation], inputs.sizes.F
    out_D = leaves["x"][t] * 0
    for k in range(inputs.sizes.K):
        if inputs.mask_TK is not None and not inputs.mask_TK[t, k]:
            continue
        e = int(inputs.ids_TK[t, k])
        h_U = _matrix(inputs, per_expert, "up", e) @ leaves["x"][t]
        if "b_up" in leaves:
            h_U = h_U + per_expert["b_up"][e]
        value_F = act(h_U[F:]) if inputs.sizes.activation in ON_VALUE else h_U[F:]
        a_F = act(h_U[:F]) * value_F if inputs.sizes.gated else act(h_U)
        y_D = _matrix(inputs, per_expert, "down", e) @ a_F
        if "b_down" in leaves:
            y_D = y_D + per_expert["b_down"][e]
        out_D = out_D + leaves["weights"][t, k] * y_D
    return out_D


def _matrix(inputs: Inputs, per_expert: Mapping[str, tuple[Tensor, ...]], side: str, e: int) -> Tensor:
    """The matrix with its low-rank difference made: what no back end does."""
    matrix = per_expert[f"w_{side}"][e]
    if not inputs.sizes.rank:
        return matrix
    low_a, low_b = per_expert[f"low_a_{side}"][e], per_expert[f"low_b_{side}"][e]
    return matrix + inputs.sizes.scale * low_b @ low_a


def errors(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By name: the L2 norm of the error and of the reference."""
    return {
        n: (float((found[n].double().cpu() - reference[n]).norm()), float(reference[n].norm())) for n in found
    }


def assert_agrees(
    name: str, inputs: Inputs, reference: Mapping[str, Tensor], wanted: Iterable[str], slack: float = 1.0
) -> dict[str, Tensor]:
    """Holds a back end to the fp64 reference on inputs that have their dtype already.

    fp64: 1e-12 of the norm, some thousand rounding steps for sums of at most 2000 terms that may cancel.
    Narrower: at most twice the error of the plain loop, plus `slack` rounding steps of the norm, for cases so
    small that the loop's error is a matter of luck.

    Returns:
        What the back end has computed.
    """
    dtype = inputs.tensors["x"].dtype
    computed = run_backend(name, inputs, wanted)
    found = errors(computed, reference)
    if dtype == torch.float64:
        bounds = {n: 1e-12 * norm for n, (_, norm) in found.items()}
    else:
        plain = errors(run_backend("loop", inputs, wanted), reference)
        floor = slack * torch.finfo(dtype).eps
        bounds = {n: 2 * error + floor * norm for n, (error, norm) in plain.items()}
    wrong = {n: (error, bounds[n]) for n, (error, _) in found.items() if not error <= bounds[n]}
    assert not wrong, f"{name} in {dtype}, (error, bound) by name: {wrong}"
    return computed
