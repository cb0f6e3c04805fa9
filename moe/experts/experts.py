"""Experts of a layer: stacked weights and the call into the kernels.

Letters: N rows, D model width, E experts, K slots a row, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.backend import ExpertTensors, LowRank, MainGrads, Workload
from kernels.expert_mlp import Choice, expert_mlp
from moe.dispatch.base import Dispatched
from moe.experts.backend_selector import BackendSelector
from moe.experts.lora import FACTORS, factor_shapes
from moe.experts.lora_config import LoraConfig
from moe.experts.weights import ExpertBank


class Experts(nn.Module):
    """Module of E feed-forward networks of one shape, with weights stacked ``[E, out, in]``.

    Attributes:
        w_up_EUD: Gate rows first, then up rows, when gated.
        w_down_EDF: Down projection.
        b_up_EU: Bias of the up projection, or None.
        b_down_ED: Bias of the down projection, or None.
        lora: Config of the low-rank factors, which are parameters with the names of
            `moe.experts.lora.FACTORS`; rank 0: none.
        shape: (E, D, F) over all ranks.
        backends: Selector of the back end.
        adds_to_main_grads: Adds the weights' gradients, where the back end can, to the fp32 buffers that an
            engine attaches as ``main_grad`` (Megatron's convention), instead of returning them.
        ranks: Expert-parallel ranks, each of which holds a slice of the experts.
    """

    parameter_role: ClassVar[str] = "expert"

    def __init__(self, bank: ExpertBank, backend: str = "auto") -> None:
        """Adopts the tensors of a bank.

        Args:
            bank: The initial weights.
            backend: A name of `kernels.expert_mlp.BACKENDS`, or ``auto``.
        """
        super().__init__()
        self.activation = bank.activation
        self.gated = bank.gated
        self.backends = BackendSelector(backend)
        self.ranks = 1
        self.adds_to_main_grads = False
        # Kept, as engines may free the weights between passes.
        self.shape = tuple(bank.w_down_EDF.shape)
        self.w_up_EUD = nn.Parameter(bank.w_up_EUD)
        self.w_down_EDF = nn.Parameter(bank.w_down_EDF)
        self.b_up_EU = None if bank.b_up_EU is None else nn.Parameter(bank.b_up_EU)
        self.b_down_ED = None if bank.b_down_ED is None else nn.Parameter(bank.b_down_ED)
        self.lora = LoraConfig()
        # Matrices stacked in one parameter; optimizers that orthogonalise split them.
        self.fused_rows = {"w_up_EUD": 2} if bank.gated else {}

    @torch.no_grad()
    def add_low_rank(self, lora: LoraConfig) -> None:
        """Freezes weights and biases, and adds factors of zeros.

        Call it before the experts are sharded. Weights on the meta device get factors there.

        Args:
            lora: Config with a rank above 0.
        """
        assert lora.rank > 0 and not self.lora.rank, (lora, self.lora)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name, shape in factor_shapes(self.w_up_EUD, self.w_down_EDF, lora.rank).items():
            setattr(self, name, nn.Parameter(self.w_up_EUD.new_zeros(shape)))
        if "w_up_EUD" in self.fused_rows:
            self.fused_rows[FACTORS["w_up_EUD"][1]] = self.fused_rows["w_up_EUD"]
        self.lora = lora

    def forward(self, sent: Dispatched) -> Tensor:
        """Runs every row through its experts and returns the weighted sums over slots, ``[N, D]``."""
        device = sent.rows_ND.device
        dtype = sent.rows_ND.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        work = self._workload(device, dtype)
        # Graphs, and gradients that are added to buffers, need one back end for every number of rows.
        fixed = torch.compiler.is_compiling() or self.adds_to_main_grads
        choice = self.backends.choose(work if fixed else work.with_rows(sent.plan))
        with torch.autocast(device.type, enabled=False):
            tensors = ExpertTensors(
                w_up_EUD=local_tensor(self.w_up_EUD).to(dtype),
                w_down_EDF=local_tensor(self.w_down_EDF).to(dtype),
                activation=self.activation,
                gated=self.gated,
                b_up_EU=None if self.b_up_EU is None else local_tensor(self.b_up_EU).to(dtype),
                b_down_ED=None if self.b_down_ED is None else local_tensor(self.b_down_ED).to(dtype),
                low_rank=self._low_rank(dtype),
                main_grads=self._main_grads(work),
            )
            return expert_mlp(sent.rows_ND.to(dtype), sent.weights_NK, sent.plan, tensors, choice.backend)

    def _low_rank(self, dtype: torch.dtype) -> LowRank | None:
        if not self.lora.rank:
            return None
        (a_up, b_up), (a_down, b_down) = (
            [local_tensor(getattr(self, name)).to(dtype) for name in FACTORS[weight]]
            for weight in ("w_up_EUD", "w_down_EDF")
        )
        return LowRank(a_up, b_up, a_down, b_down, self.lora.scale)

    def _main_grads(self, work: Workload) -> MainGrads | None:
        """Returns the buffers that backward adds to; None if gradients are returned."""
        if not (self.adds_to_main_grads and torch.is_grad_enabled()):
            return None
        weights = (self.w_up_EUD, self.w_down_EDF)
        buffers = [getattr(weight, "main_grad", None) for weight in weights if weight.requires_grad]
        fits = [buffer is not None and buffer.dtype == torch.float32 for buffer in buffers]
        if len(fits) < 2 or not all(fits) or not self.backends.accumulates(work):
            return None
        for weight in weights:
            # Tells engines that there is no returned gradient to add.
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        up, down = buffers
        assert up is not None and down is not None
        return MainGrads(up, down)

    def _workload(self, device: torch.device, dtype: torch.dtype) -> Workload:
        E, D, F = local_tensor(self.w_down_EDF).shape
        has_bias = self.b_up_EU is not None or self.b_down_ED is not None
        rank, gated = self.lora.rank, self.gated
        return Workload(device, dtype, E, D, F, self.activation, has_bias, rank, gated=gated)

    def backend_choice(self) -> Choice | None:
        """Returns the back end that ran last, with the reason; None before the first forward pass."""
        return self.backends.last

    def extra_repr(self) -> str:
        """Describes the shape when the model is printed."""
        E, D, F = self.shape
        return f"experts={E}, model_width={D}, expert_width={F}, {self.activation}, gated={self.gated}"


def local_tensor(weight: Tensor) -> Tensor:
    """Returns the part of a weight on this rank: a slice of the experts under expert parallelism."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
