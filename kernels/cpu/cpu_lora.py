"""Low-rank factors of one weight on a CPU (LoRA, arXiv 2106.09685), apart from the product that they join.

One side of an expert is ``out = W x + B z`` with ``z = scale * A x``. With ``u = scale * B^T dout`` its
gradients are ``dx += A^T u``, ``dA = u x^T`` and ``dB = dout z^T``.

Letters: E experts, R routed rows, n rows of one group, I and O widths in and out, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.backend import LowRank
from kernels.cpu.cpu_groups import GroupRows, add_rows_times, rows_times


@dataclass(frozen=True)
class LoraSide:
    """Factors of the up or of the down projection.

    Attributes:
        a_ErI: ``[E, r, I]``.
        b_EOr: ``[E, O, r]``.
        scale: ``alpha / r``.
    """

    a_ErI: Tensor
    b_EOr: Tensor
    scale: float

    @staticmethod
    def both(low: LowRank | None) -> tuple[LoraSide | None, LoraSide | None]:
        """Returns the sides of up and down; None without factors."""
        if low is None:
            return None, None
        up, down = (low.a_up_ErD, low.b_up_EUr), (low.a_down_ErF, low.b_down_EDr)
        return LoraSide(*up, low.scale), LoraSide(*down, low.scale)

    def add_to(self, out_nO: Tensor, rows: GroupRows, z_nr: Tensor) -> None:
        """Writes ``z = scale * A x``, which backward reads, and adds ``B z`` to the output."""
        rows_times(rows, self.a_ErI.transpose(1, 2), z_nr)
        add_rows_times(GroupRows(z_nr.mul_(self.scale), rows.group), self.b_EOr.transpose(1, 2), out_nO)

    def output_gradient(self, grad: GroupRows) -> GroupRows:
        """Returns ``u = scale * B^T dout``."""
        u_nr = grad.rows_nK.new_empty(len(grad.rows_nK), self.a_ErI.shape[1])
        rows_times(grad, self.b_EOr, u_nr)
        return GroupRows(u_nr.mul_(self.scale), grad.group)

    def add_input_gradient(self, u: GroupRows, dx_nI: Tensor) -> None:
        """Adds ``A^T u``."""
        add_rows_times(u, self.a_ErI, dx_nI)
