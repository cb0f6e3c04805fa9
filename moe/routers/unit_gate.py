"""What routers for experts that divide a dense network have in common: chosen experts begin at weight 1.

Divided experts are summed, not averaged. The weight is ``1 + u_e p_e`` with p the softmax of the scores and u
learned from 0, so that a mixture begins as the sum of the neurons that are chosen (CMoE, arXiv 2502.04416).

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from moe.errors import require
from moe.routers.base import Router, RouterConfig
from moe.routing.balance import count_load, switch_loss
from moe.routing.load_bias import LoadBias
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class UnitGateConfig(RouterConfig):
    """Config that these routers share."""

    top_k: int = 2
    """Experts a token."""
    init_std: float = 0.02
    """Standard deviation of the rows where no upcycling method sets them."""
    bias_rate: float = 1e-3
    """Size of a step of the bias that evens out load; 0 leaves it at 0."""
    balance_coef: float = 1e-4
    """Coefficient of the Switch balance loss. Until u has moved it alone trains the rows; 0 leaves it out."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."),
            (
                self.init_std > 0,
                "init_std",
                "a router of zeros sends every token to the first experts",
                "Set it above 0; 0.02 is usual.",
            ),
            *(
                (getattr(self, name) >= 0, name, "it would favour the loaded experts", "Set it to 0 or more.")
                for name in ("bias_rate", "balance_coef")
            ),
        )


UnitGateConfigT = TypeVar("UnitGateConfigT", bound=UnitGateConfig)


class UnitGateRouter(Router[UnitGateConfigT], Generic[UnitGateConfigT]):
    """Chooses by probability plus bias; weighs by ``1 + u p``.

    Attributes:
        gain_E: u.
        load_bias: Moves towards even load.
    """

    compile_unsupported_reason: ClassVar[str | None] = (
        "what it keeps of a step is filed by step and micro-batch, numbers that a graph holds fixed: each is "
        "compiled anew. Set torch._dynamo.config.allow_unspec_int_on_nn_module, or compile the experts alone"
    )

    def __init__(self, config: UnitGateConfigT, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.gain_E = nn.Parameter(torch.zeros(num_experts))
        self.load_bias = LoadBias(num_experts, config.bias_rate)

    @property
    def top_k(self) -> int:
        """K."""
        return self.config.top_k

    @property
    def weights_sum_to_one(self) -> bool:
        """False: they sum to about K."""
        return False

    @property
    def weighs_one(self) -> bool:
        """Until u moves."""
        return not bool(self.gain_E.any())

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the rows; u and bias are 0."""
        for name, parameter in self.named_parameters():
            if name == "gain_E":
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.init_std, generator=generator)
        self.load_bias.bias_E.zero_()

    @abstractmethod
    def scores(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` in at least fp32."""

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the K experts of highest probability plus bias."""
        losses: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = self.scores(x_TD)
            probs_TE = scores_TE.softmax(-1)
            choice_TE = probs_TE.detach() + self.load_bias.bias_E
            if not self.config.bias_rate:
                choice_TE = scores_TE.detach()  # the same order, and probabilities may tie by rounding
            ids_TK = choice_TE.topk(ctx.top_k(self.top_k), dim=-1).indices
            weights_TK = 1 + self.gain_E.to(probs_TE.dtype)[ids_TK] * probs_TE.gather(-1, ids_TK)
            if self.training and self.config.balance_coef:
                mask_T = ctx.token_mask_T(len(ids_TK))
                load = count_load(ids_TK, self.num_experts, mask_T, ctx.run.group)
                losses["balance"] = self.config.balance_coef * switch_loss(load, probs_TE, mask_T)
        if self.training:
            self.load_bias.count(ids_TK, ctx)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            scores_TE=probs_TE,
            logits_TE=scores_TE,
            losses=losses,
        )

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves the bias."""
        self.load_bias.move(ctx)
