"""ReMoE: the gates are ReLUs, so that routing is differentiable and the number of experts a token varies.

Source: Wang, Zhu and Chen, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing" (arXiv
2412.14711, Eq. 5 for the gate, 7-9 for the penalty and its controller); thu-ml/ReMoE for the constants.
There one penalty serves all layers and follows their mean sparsity; here every layer has its own, so that
each settles at K.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from moe.errors import require
from moe.routers.projection import ProjectionConfig, ProjectionRouter
from moe.routing.balance import Load
from moe.routing.chosen import chosen_load, coverage_metrics
from moe.routing.dense_gates import slots_of_gates
from moe.routing.fp32_buffers import Fp32Buffers
from moe.routing.step_sums import StepSums
from moe.types import LayerContext, Routing

#: Keeps the penalty off 0, from where no factor brings it back, and off infinity.
_PENALTY_RANGE = (1e-15, 1e15)


@dataclass(frozen=True)
class ReLUConfig(ProjectionConfig):
    """Config of `ReLURouter`. ``top_k`` is the mean number of experts a token that the penalty steers to."""

    name: Literal["relu"] = "relu"
    init_std: float = 0.01
    """Standard deviation of the initial router weights."""
    penalty_init: float = 1e-8
    """Coefficient of the L1 penalty on the gates before the first step (lambda)."""
    penalty_factor: float = 1.2
    """What the penalty is multiplied by after a step with too many experts a token, else divided by."""
    penalty_by_load: bool = True
    """Weigh each expert's penalty by its load, which balances; else all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                _PENALTY_RANGE[0] <= self.penalty_init <= _PENALTY_RANGE[1],
                "penalty_init",
                (
                    f"the penalty is only ever multiplied and divided, within {_PENALTY_RANGE[0]} and "
                    f"{_PENALTY_RANGE[1]}"
                ),
                "Set it to 1e-8.",
            ),
            (
                self.penalty_factor > 1,
                "penalty_factor",
                "a penalty that does not grow makes no gate sparse",
                "Set it above 1; 1.2 is usual.",
            ),
        )


class ReLURouter(Fp32Buffers, ProjectionRouter[ReLUConfig]):
    """Experts with a positive logit, weighed by it. Starts with half of the experts for every token.

    Attributes:
        penalty: fp32 scalar, lambda; it moves after optimizer steps only and is saved with the model.
    """

    name = "relu"
    config_class = ReLUConfig
    host_syncs: ClassVar[str | None] = (
        "K, the slots of a token, is the most experts that any token of the batch uses: asked once a pass"
    )
    compile_unsupported_reason: ClassVar[str | None] = (
        "what it keeps of a step is filed by step and micro-batch, numbers that a graph holds fixed: each is "
        "compiled anew. Set torch._dynamo.config.allow_unspec_int_on_nn_module, or compile the experts alone"
    )
    fp32_buffers: ClassVar[tuple[str, ...]] = ("penalty",)
    penalty: Tensor

    def __init__(self, config: ReLUConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.register_buffer("penalty", torch.tensor(config.penalty_init))
        self._sums = StepSums()
        self.reset_parameters()

    @property
    def weights_sum_to_one(self) -> bool:
        """False: a ReLU may be anything from 0 up."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Normal weights; the penalty of the config."""
        super().reset_parameters(generator)
        self.penalty.fill_(self.config.penalty_init)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the experts whose gate is open, be it none or all."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            gates_TE = logits_TE.relu()
            ids_TK, weights_TK, used_TK = slots_of_gates(gates_TE)
            losses, metrics = self._regularise(gates_TE, ctx) if self.training else ({}, {})
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=gates_TE,
            logits_TE=logits_TE,
            losses=losses,
            metrics=metrics,
        )

    def _regularise(self, gates_TE: Tensor, ctx: LayerContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        chosen_TE = gates_TE.detach() > 0
        load = chosen_load(chosen_TE, ctx)
        ranks = 1 if ctx.run.group is None else ctx.run.group.size()
        tokens = load.tokens_per_rank * ranks
        self._sums.write(ctx.run, torch.stack([load.num_slots, tokens]))
        mask_T = ctx.token_mask_T(len(gates_TE))
        value = self.penalty * relu_penalty(gates_TE, load, tokens, self._penalty_top_k, mask_T)
        metrics = coverage_metrics(chosen_TE, ctx) | {"penalty": self.penalty.clone()}
        return {"sparsity": value}, metrics

    @property
    def _penalty_top_k(self) -> int | None:
        return self.top_k if self.config.penalty_by_load else None

    @torch.no_grad()
    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Raises the penalty when the tokens of the step, of all ranks, used more than K experts each."""
        sums = self._sums.take()
        if sums is None:
            return
        used, tokens = sums
        factor = self.config.penalty_factor
        # Sparsity below 1 - K/E is the same as more than K experts a token.
        moved = torch.where(used > self.top_k * tokens, self.penalty * factor, self.penalty / factor)
        moved = torch.where(tokens > 0, moved, self.penalty)
        self.penalty.copy_(moved.clamp(*_PENALTY_RANGE))


def relu_penalty(
    gates_TE: Tensor, load: Load, tokens: Tensor, top_k: int | None, mask_T: Tensor | None = None
) -> Tensor:
    """``E / (K T^2) sum_e count_e sum_t g_te`` (Eq. 9), or the mean over tokens of ``sum_e g_te`` (Eq. 7).

    Args:
        gates_TE: ``[T, E]`` gates; they carry the gradient.
        load: Open gates of each expert over all ranks.
        tokens: Real tokens over all ranks.
        top_k: K; None leaves the load out.
        mask_T: ``[T]`` bool, True for real tokens.

    Returns:
        A scalar, without coefficient.
    """
    if mask_T is not None:
        gates_TE = gates_TE * mask_T[:, None]
    mean_E = gates_TE.sum(0) / load.tokens_per_rank.clamp_min(1)
    if top_k is None:
        return mean_E.sum()
    share_E = load.counts_E * (gates_TE.shape[1] / top_k) / tokens.clamp_min(1)
    return (share_E * mean_E).sum()
