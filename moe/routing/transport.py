"""Entropic optimal transport between tokens and experts: Sinkhorn's iteration in the log domain.

The plan ``P_te = exp(K_te + u_t + v_e)`` of a kernel K (scores over a temperature) has the wanted row and
column sums and is closest to ``exp(K)`` (Cuturi 2013, arXiv 1306.0895). Only sums over tokens cross ranks, so
N ranks that share the tokens find the same potentials as one rank.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from moe.routing.sinkhorn_rule import Residual, SinkhornRule


@dataclass(frozen=True)
class Potentials:
    """Result of Sinkhorn's iteration.

    Attributes:
        row_T: ``[T]`` u, logarithm of the row scaling; -inf for padding.
        column_E: ``[E]`` v, logarithm of the column scaling; the same on every rank.
        iterations: int64 scalar on the device: iterations until the rule was met.
        residual: Scalar on the device: the final residual.
    """

    row_T: Tensor
    column_E: Tensor
    iterations: Tensor
    residual: Tensor

    def plan(self, kernel_TE: Tensor) -> Tensor:
        """Returns the ``[T, E]`` plan ``exp(K + u + v)``; rows of padding are zero."""
        return (kernel_TE + self.row_T[:, None] + self.column_E).exp()


class _SumOverRanks(torch.autograd.Function):
    """Autograd function that sums over a group, in backward as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums over the ranks of a group (None: the value itself), differentiably.

    The gradient is that of the sum of all ranks' losses, which data parallelism averages.
    """
    if group is None:
        return value
    total: Tensor = _SumOverRanks.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def column_logsumexp(value_TE: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Returns the ``[E]`` logarithm of the sum of exponentials over the tokens of all ranks of a group.

    Without tokens, or if all have -inf, the result is a large negative number instead of -inf.
    """
    E = value_TE.shape[1]
    floor = torch.finfo(value_TE.dtype).min / 4
    padded_TE = torch.cat([value_TE.detach(), value_TE.new_full((1, E), floor)])
    largest_E = padded_TE.amax(0)
    if group is not None:
        torch.distributed.all_reduce(largest_E, op=ReduceOp.MAX, group=group)
    total_E = sum_over_ranks((value_TE - largest_E).exp().sum(0), group)
    return largest_E + total_E.clamp_min(torch.finfo(value_TE.dtype).tiny).log()


class _Problem:
    """Transport problem with its two half steps and the residual."""

    def __init__(
        self,
        kernel_TE: Tensor,
        mask_T: Tensor | None,
        row_mass_T: Tensor | None,
        column_mass_E: Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        T, E = kernel_TE.shape
        mass_T = kernel_TE.new_ones(T) if row_mass_T is None else row_mass_T.to(kernel_TE)
        if mask_T is not None:
            mass_T = mass_T.masked_fill(~mask_T, 0)
        if column_mass_E is None:
            with torch.no_grad():
                total = sum_over_ranks(mass_T.sum(), group)
            # A batch of padding alone has no mass; any value with a finite logarithm will do.
            column_mass_E = torch.where(total > 0, total, 1).expand(E) / E
        self.kernel_TE = kernel_TE
        self.group = group
        self.log_rows_T = mass_T.log()
        self.mass_E = column_mass_E.to(kernel_TE)
        self.log_columns_E = self.mass_E.log()
        # Every scaling starts at 1; tokens without mass are left out of every sum.
        self.start_T = torch.zeros_like(mass_T).masked_fill(mass_T == 0, -torch.inf)

    def rows(self, column_E: Tensor) -> Tensor:
        return self.log_rows_T - (self.kernel_TE + column_E).logsumexp(1)

    def columns(self, row_T: Tensor) -> Tensor:
        return self.log_columns_E - column_logsumexp(self.kernel_TE + row_T[:, None], self.group)

    def residual(self, kind: Residual, old_E: Tensor, new_E: Tensor) -> Tensor:
        # Detached here, as torch.compile does not trace a no_grad decorator.
        old_E, new_E = old_E.detach(), new_E.detach()
        # With exact rows, the column sums are c * exp(old - new): the next update brings them to c.
        if kind == "column_sums":
            return (self.mass_E * torch.expm1(old_E - new_E)).square().sum().sqrt()
        # Scalings that overflow the dtype differ by nan.
        return (old_E.exp() - new_E.exp()).abs().mean().nan_to_num(nan=torch.inf)


def sinkhorn(
    kernel_TE: Tensor,
    rule: SinkhornRule | None = None,
    *,
    mask_T: Tensor | None = None,
    row_mass_T: Tensor | None = None,
    column_mass_E: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Potentials:
    """Computes potentials u, v such that ``exp(K + u + v)`` has the wanted row and column sums.

    It is differentiable through the iterations if the kernel requires a gradient; use ``no_grad`` otherwise.
    It computes in the kernel's dtype: in fp32 a column sum of mass m is met to about ``max|K| * m * 1e-7`` at
    best, so pass fp64 for a tight tolerance or a sharp kernel.

    Args:
        kernel_TE: ``[T, E]`` finite scores of this rank's tokens, divided by the temperature.
        rule: Order, stop and bound; ``SinkhornRule()`` by default.
        mask_T: ``[T]`` bool, True for real tokens; padding has no mass.
        row_mass_T: ``[T]`` row sums of this rank's tokens; 1 for each by default.
        column_mass_E: ``[E]`` positive column sums over all ranks; the mass of all rows over E by default.
        group: The ranks whose tokens belong together, all of which must call; None for this rank alone.
    """
    rule = SinkhornRule() if rule is None else rule
    problem = _Problem(kernel_TE, mask_T, row_mass_T, column_mass_E, group)
    column_E = problem.columns(problem.start_T) if rule.rows_last else torch.zeros_like(problem.mass_E)
    row_T = problem.start_T
    done = torch.zeros((), dtype=torch.bool, device=kernel_TE.device)
    iterations = torch.zeros((), dtype=torch.int64, device=kernel_TE.device)
    residual = torch.full((), torch.inf, dtype=kernel_TE.dtype, device=kernel_TE.device)
    for number in range(1, rule.max_iterations + 1):
        new_T = problem.rows(column_E)
        new_E = problem.columns(new_T)
        row_T = torch.where(done, row_T, new_T)
        iterations = iterations + ~done
        residual = torch.where(done, residual, problem.residual(rule.residual, column_E, new_E))
        met = done if rule.tolerance is None else done | (residual <= rule.tolerance)
        # With rows last, keep the columns from which the last rows were computed.
        keep = met | (number == rule.max_iterations) if rule.rows_last else done
        column_E = torch.where(keep, column_E, new_E)
        done = met
        if rule.tolerance is not None and number % rule.check_every == 0 and bool(done):
            break
    return Potentials(row_T, column_E, iterations, residual)
