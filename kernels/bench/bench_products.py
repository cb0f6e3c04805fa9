"""Times the grouped product against a dense one of the same size: the cost of small experts on a CPU.

Letters: E experts, n rows of an expert, R = E n rows, N output width, K input width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.timing import Timing, interleave, median_ratio, summarise


@dataclass(frozen=True)
class ProductShape:
    """A grouped product.

    Attributes:
        experts: E.
        rows: n, the same for every expert.
        out_width: N.
        in_width: K.
        dtype: Dtype of both operands.
    """

    experts: int
    rows: int
    out_width: int
    in_width: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Name in tables."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.experts} experts x {self.rows} rows x {self.out_width}x{self.in_width} {kind}"


#: Shapes and the share of the dense rate that the project aims at.
GOALS: tuple[tuple[ProductShape, float], ...] = (
    (ProductShape(8, 512, 512, 1024, torch.float32), 0.85),
    (ProductShape(8, 512, 512, 1024, torch.bfloat16), 0.85),
    (ProductShape(64, 64, 512, 256, torch.float32), 0.75),
    (ProductShape(64, 64, 512, 256, torch.bfloat16), 0.60),
    (ProductShape(128, 64, 256, 128, torch.bfloat16), 0.55),
)


@dataclass(frozen=True)
class ProductResult:
    """Measurement of one implementation of the product.

    Attributes:
        name: ``dense``, ``mm`` (one product an expert, as the back end ``cpu`` does), ``bmm`` or
            ``grouped_mm``.
        seconds: Median and spread.
        gflops: Per second, in units of 1e9.
        share: Its rate over that of the dense product, round by round.
        error: Relative error of the output against fp64; None for dense, which computes another product.
    """

    name: str
    seconds: Timing
    gflops: float
    share: Timing
    error: float | None


def measure_products(shape: ProductShape, rounds: int) -> list[ProductResult]:
    """Checks the implementations against fp64, then times them interleaved.

    Raises:
        RuntimeError: An implementation computes something else.
    """
    g = torch.Generator().manual_seed(0)
    E, n, N, K = shape.experts, shape.rows, shape.out_width, shape.in_width
    x_RK = torch.randn(E * n, K, generator=g).to(shape.dtype)
    w_ENK = torch.randn(E, N, K, generator=g).to(shape.dtype)
    dense_NK = torch.randn(N, K, generator=g).to(shape.dtype)
    expected_RN = torch.bmm(x_RK.view(E, n, K).double(), w_ENK.double().transpose(1, 2)).view(E * n, N)
    out_RN = x_RK.new_empty(E * n, N)
    runners = _runners(x_RK, w_ENK, dense_NK, out_RN)
    errors: dict[str, float | None] = {"dense": None}
    for name, run in runners.items():
        if name != "dense":
            error = float((run().double().view_as(expected_RN) - expected_RN).norm() / expected_RN.norm())
            if not error <= 4 * torch.finfo(shape.dtype).eps:
                raise RuntimeError(f"{name} computes something else: relative error {error:.1e}")
            errors[name] = error
    seconds = interleave(runners, rounds)
    operations = 2 * E * n * N * K
    return [
        ProductResult(
            name,
            summarise(values),
            operations / summarise(values).median / 1e9,
            median_ratio(seconds["dense"], values),
            errors[name],
        )
        for name, values in seconds.items()
    ]


def _runners(
    x_RK: Tensor, w_ENK: Tensor, dense_NK: Tensor, out_RN: Tensor
) -> dict[str, Callable[[], Tensor]]:
    E, N, K = w_ENK.shape
    n = len(x_RK) // E
    ends_E = torch.arange(n, E * n + 1, n, dtype=torch.int32)

    def one_by_one() -> Tensor:
        for e in range(E):
            torch.mm(x_RK[e * n : (e + 1) * n], w_ENK[e].t(), out=out_RN[e * n : (e + 1) * n])
        return out_RN

    return {
        "dense": lambda: torch.mm(x_RK, dense_NK.t(), out=out_RN),
        "mm": one_by_one,
        "bmm": lambda: torch.bmm(x_RK.view(E, n, K), w_ENK.transpose(1, 2), out=out_RN.view(E, n, N)),
        "grouped_mm": lambda: F.grouped_mm(x_RK, w_ENK.transpose(1, 2), offs=ends_E),
    }
