"""The experts of a layer: stacked weights and the call into the kernels' one seam.

Letters: N rows, D model width, E experts, K slots a row, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from kernels.backend import ExpertTensors, LowRank, MainGrads, Workload
from kernels.expert_mlp import BACKENDS, Choice, choose_backend, expert_mlp, few_products
from kernels.plan.row_plan import RowPlan
from moe.dispatch.base import Dispatched
from moe.errors import require
from moe.experts.lora import FACTORS, LoraConfig, factor_shapes
from moe.experts.weights import ExpertBank
from moe.types import Config

_LOG = logging.getLogger("graft.experts")


@dataclass(frozen=True)
class ExpertsConfig(Config):
    """How the experts are computed."""

    backend: str = "auto"
    """A back end of `kernels.expert_mlp`, or ``auto``: by device, dtype and shape, on a CPU by rows too."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank factors that train in the place of the experts' weights."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.backend == "auto" or self.backend in BACKENDS,
                "backend",
                "is no back end",
                f"Choose auto, {', '.join(sorted(BACKENDS))}.",
            ),
        )


class Experts(nn.Module):
    """E feed-forward networks of one shape, their weights stacked ``[E, out, in]``.

    Attributes:
        w_up_EUD: Gate rows first, then up rows, when gated.
        w_down_EDF: Down projection.
        b_up_EU: Bias of the up projection, or None.
        b_down_ED: Bias of the down projection, or None.
        lora: Of the low-rank factors, which are parameters by the names of `moe.experts.lora.FACTORS`; rank
            0: there are none.
        shape: (E, D, F) of all ranks.
        adds_to_main_grads: Whether the weights' gradients are added to the fp32 buffers that an engine has
            hung on them as ``main_grad`` (Megatron's convention), where the back end can, and not returned.
        ranks: Over how many ranks the experts are spread, each of which holds a slice of them.
    """

    parameter_role: ClassVar[str] = "expert"

    def __init__(self, bank: ExpertBank, backend: str = "auto") -> None:
        """Takes over the tensors of a bank.

        Args:
            bank: The initial weights.
            backend: A name of `kernels.expert_mlp.BACKENDS`, or ``auto``.
        """
        super().__init__()
        self.activation = bank.activation
        self.gated = bank.gated
        self.backend = backend
        self.ranks = 1
        self.adds_to_main_grads = False
        # Of all ranks: what an engine leaves of the weights between passes may be empty.
        self.shape = tuple(bank.w_down_EDF.shape)
        self.w_up_EUD = nn.Parameter(bank.w_up_EUD)
        self.w_down_EDF = nn.Parameter(bank.w_down_EDF)
        self.b_up_EU = None if bank.b_up_EU is None else nn.Parameter(bank.b_up_EU)
        self.b_down_ED = None if bank.b_down_ED is None else nn.Parameter(bank.b_down_ED)
        self.lora = LoraConfig()
        # Which of our matrices holds several, one above the other: what orthogonalises takes them apart.
        self.fused_rows = {"w_up_EUD": 2} if bank.gated else {}
        self._choices: dict[tuple[torch.device, torch.dtype, bool], Choice] = {}
        self._ran: Choice | None = None
        self._adding: dict[tuple[torch.device, torch.dtype], bool] = {}

    @torch.no_grad()
    def add_low_rank(self, lora: LoraConfig) -> None:
        """Freezes the weights and biases, and puts factors of zeros beside the weights.

        To be called before the experts are spread over ranks. Weights without memory get such factors.

        Args:
            lora: Of a rank above 0.
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
        """Runs every row through its experts and sums over its slots, weighted: ``[N, D]``."""
        device = sent.rows_ND.device
        dtype = sent.rows_ND.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        choice = self._choice(device, dtype, None if self._for_all_batches() else sent.plan)
        with torch.autocast(device.type, enabled=False):
            tensors = ExpertTensors(
                w_up_EUD=_held(self.w_up_EUD).to(dtype),
                w_down_EDF=_held(self.w_down_EDF).to(dtype),
                activation=self.activation,
                gated=self.gated,
                b_up_EU=None if self.b_up_EU is None else _held(self.b_up_EU).to(dtype),
                b_down_ED=None if self.b_down_ED is None else _held(self.b_down_ED).to(dtype),
                low_rank=self._low_rank(dtype),
                main_grads=self._main_grads(device, dtype),
            )
            return expert_mlp(sent.rows_ND.to(dtype), sent.weights_NK, sent.plan, tensors, choice.backend)

    def _low_rank(self, dtype: torch.dtype) -> LowRank | None:
        if not self.lora.rank:
            return None
        (a_up, b_up), (a_down, b_down) = (
            [_held(getattr(self, name)).to(dtype) for name in FACTORS[weight]]
            for weight in ("w_up_EUD", "w_down_EDF")
        )
        return LowRank(a_up, b_up, a_down, b_down, self.lora.scale)

    def _main_grads(self, device: torch.device, dtype: torch.dtype) -> MainGrads | None:
        """The buffers that backward is to add to; None where gradients are returned."""
        if not (self.adds_to_main_grads and torch.is_grad_enabled()):
            return None
        weights = (self.w_up_EUD, self.w_down_EDF)
        buffers = [getattr(weight, "main_grad", None) for weight in weights if weight.requires_grad]
        fits = [buffer is not None and buffer.dtype == torch.float32 for buffer in buffers]
        if len(fits) < 2 or not all(fits) or not self._adds(device, dtype):
            return None
        for weight in weights:
            # Whoever else would add what autograd returns is told that there is nothing to add.
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        up, down = buffers
        assert up is not None and down is not None
        return MainGrads(up, down)

    def _adds(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the back end that runs can add to buffers: it is not chosen by that."""
        key = (device, dtype)
        if key not in self._adding:
            work = replace(self._workload(device, dtype), accumulates=True)
            unsupported_reason = self._choice(device, dtype).backend.unsupported_reason(work)
            self._adding[key] = unsupported_reason is None
            if unsupported_reason is not None:
                _LOG.debug("gradients of experts are returned, not added in fp32: %s", unsupported_reason)
        return self._adding[key]

    @torch.no_grad()
    def spread(self, mesh: DeviceMesh) -> None:
        """Keeps this rank's slice of the experts alone; names and shapes stay those of all of them.

        Args:
            mesh: One axis of ranks that hold the same weights so far. Their number divides E.
        """
        count, ranks = len(self.w_down_EDF), mesh.size()
        self.ranks = ranks
        assert mesh.ndim == 1 and count % ranks == 0, (mesh, count)
        mine = slice(count // ranks * mesh.get_local_rank(), count // ranks * (mesh.get_local_rank() + 1))
        for name, whole in list(self.named_parameters()):
            # A copy: a view would keep the other ranks' experts in memory.
            # What has no memory yet gets it later, for the slice alone.
            part = whole[mine].clone() if whole.is_meta else whole[mine].to(mesh.device_type, copy=True)
            shard = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            setattr(self, name, nn.Parameter(shard, requires_grad=whole.requires_grad))

    def _for_all_batches(self) -> bool:
        """Whether who computes must not depend on how many rows there are."""
        # What adds gradients to buffers is not to be left for what cannot.
        return torch.compiler.is_compiling() or self.adds_to_main_grads

    def _choice(self, device: torch.device, dtype: torch.dtype, plan: RowPlan | None = None) -> Choice:
        work = self._workload(device, dtype)
        if plan is not None:
            work = work.with_rows(plan)
        key = (device, dtype, few_products(work))
        if key not in self._choices:
            self._choices[key] = choose_backend(work, self.backend)
            # At debug level: the run logs the choice of its first layer once, at info level.
            if not torch.compiler.is_compiling():
                _LOG.debug(
                    "experts run on %s: %s", self._choices[key].backend.name, self._choices[key].reason
                )
        self._ran = self._choices[key]
        return self._ran

    def _workload(self, device: torch.device, dtype: torch.dtype) -> Workload:
        E, D, F = _held(self.w_down_EDF).shape
        has_bias = self.b_up_EU is not None or self.b_down_ED is not None
        rank, gated = self.lora.rank, self.gated
        return Workload(device, dtype, E, D, F, self.activation, has_bias, rank, gated=gated)

    def backend_choice(self) -> Choice | None:
        """The back end that ran last, with the reason; None before the first forward pass."""
        return self._ran

    def extra_repr(self) -> str:
        """Shape, for printing the model."""
        E, D, F = self.shape
        return f"experts={E}, model_width={D}, expert_width={F}, {self.activation}, gated={self.gated}"


def _held(weight: Tensor) -> Tensor:
    """What this rank holds of a weight: a slice of the experts where they are spread over ranks."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
