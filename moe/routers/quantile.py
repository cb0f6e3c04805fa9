"""Quantile balancing: thresholds of the experts follow the quantiles of their scores; causal and without a
loss.

Source: Su, "MoE Odyssey" (kexue.fm 11619: K experts for every token; 11626: a token uses every expert whose
threshold it exceeds), known to us from notes. Reconstructed: the guard for tokens without an expert, the
cap, and selection by plain top-k until the first step has set the thresholds.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from moe.errors import require
from moe.routers.projection import ProjectionConfig, ProjectionRouter
from moe.routing.chosen import coverage_metrics, shares_of_chosen, slots_of_mask
from moe.routing.moving_threshold import MovingThreshold
from moe.routing.quantiles import quantile_biases, quantile_thresholds
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class QuantileConfig(ProjectionConfig):
    """Config of `QuantileRouter`."""

    name: Literal["quantile"] = "quantile"
    mode: Literal["fixed", "dynamic"] = "fixed"
    """K experts for every token, or every expert whose threshold the token exceeds, K in the mean."""
    select_by: Literal["logits", "scores"] = "logits"
    """What is compared with the thresholds."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits, for the weights."""
    renormalise: bool = True
    """Divide the chosen scores by their sum. Copied experts are exact only when weights sum to 1."""
    iterations: int = 5
    """Iterations of quantile balancing a micro-batch, when fixed."""
    decay: float = 0.9
    """What share of a threshold a step keeps."""
    max_experts: int | None = None
    """Most experts that a token uses, when dynamic: its best by margin. null: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k != 1 or not self.renormalise,
                "top_k",
                "an only weight is always 1, and the router gets no gradient from the loss",
                "Set router.renormalise=false, or top_k to 2 or more.",
            ),
            (self.iterations >= 1, "iterations", "nothing would balance", "Set it to 1 or more."),
            (
                0 <= self.decay < 1,
                "decay",
                "a threshold keeps a share of itself that is below 1",
                "Set it to 0.9.",
            ),
            (
                self.max_experts is None or self.max_experts >= self.top_k,
                "max_experts",
                f"tokens use top_k={self.top_k} experts in the mean",
                "Set it to more than that, or to null.",
            ),
        )


class QuantileRouter(ProjectionRouter[QuantileConfig]):
    """Selects by score minus threshold; weighs by the score alone.

    Attributes:
        threshold: ``[E]`` thresholds beta; they have no gradient, move after optimizer steps only, and are
            saved with the model.
    """

    name = "quantile"
    config_class = QuantileConfig
    host_syncs: ClassVar[str | None] = (
        "when dynamic only: K, the slots of a token, is the most experts that any token uses: asked once"
    )
    compile_unsupported_reason: ClassVar[str | None] = (
        "what it keeps of a step is filed by step and micro-batch, numbers that a graph holds fixed: each is "
        "compiled anew. Set torch._dynamo.config.allow_unspec_int_on_nn_module, or compile the experts alone"
    )

    def __init__(self, config: QuantileConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.threshold = MovingThreshold(num_experts, config.decay)
        self.reset_parameters()

    @property
    def weights_sum_to_one(self) -> bool:
        """True for renormalised weights: every token uses at least one expert."""
        return self.config.renormalise

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Normal weights; thresholds that nothing has set."""
        super().reset_parameters(generator)
        self.threshold.reset()

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by the thresholds of the steps before; the present tokens move those of the next."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            softmax = self.config.score == "softmax"
            scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
            choice_TE = (logits_TE if self.config.select_by == "logits" else scores_TE).detach()
            if self.training:
                self._measure(choice_TE, ctx)
            # In log space, where scores that round to zero still compare.
            logs_TE = logits_TE if softmax or not self.config.renormalise else F.logsigmoid(logits_TE)
            used_TK: Tensor | None = None
            if self.config.mode == "fixed":
                ids_TK, weights_TK, chosen_TE = self._fixed(choice_TE, scores_TE, logs_TE)
            else:
                chosen_TE = self._above(choice_TE)
                weights_TE = shares_of_chosen(logs_TE, chosen_TE) if self.config.renormalise else scores_TE
                ids_TK, weights_TK, used_TK = slots_of_mask(chosen_TE, weights_TE)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=coverage_metrics(chosen_TE, ctx) if self.training else {},
        )

    def _margins(self, choice_TE: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, E]`` scores minus thresholds, and each token's experts by falling margin."""
        is_set = self.threshold.steps > 0
        margin_TE = choice_TE - torch.where(is_set, self.threshold.value_N, 0)
        return margin_TE, margin_TE.argsort(dim=-1, descending=True, stable=True)

    def _fixed(self, choice_TE: Tensor, scores_TE: Tensor, logs_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights of the K best, and their mask; K is known, so that no one waits for the device."""
        _, order_TE = self._margins(choice_TE)
        ids_TK = order_TE[:, : self.top_k].sort(-1).values
        weights_TK = (logs_TE if self.config.renormalise else scores_TE).gather(-1, ids_TK)
        chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        return ids_TK, weights_TK.softmax(-1) if self.config.renormalise else weights_TK, chosen_TE

    def _above(self, choice_TE: Tensor) -> Tensor:
        """``[T, E]`` bool: above the thresholds; the K best as long as no step has set any."""
        margin_TE, order_TE = self._margins(choice_TE)
        # The place of each expert in its token's order: 0 is the largest margin.
        place_TE = order_TE.argsort(dim=-1)
        chosen_TE = (margin_TE > 0) | (place_TE == 0)
        chosen_TE = torch.where(self.threshold.steps > 0, chosen_TE, place_TE < self.top_k)
        if self.config.max_experts is not None:
            chosen_TE &= place_TE < self.config.max_experts
        return chosen_TE

    def _measure(self, choice_TE: Tensor, ctx: LayerContext) -> None:
        mask_T = ctx.token_mask_T(len(choice_TE))
        tokens = choice_TE.new_full((), len(choice_TE)) if mask_T is None else mask_T.sum()
        if self.config.mode == "dynamic":
            found_E = quantile_thresholds(choice_TE, self.top_k, mask_T)
        else:
            start_E = self.threshold.value_N.to(choice_TE.dtype)
            found_E = quantile_biases(choice_TE, self.top_k, self.config.iterations, start_E, mask_T)
        self.threshold.measure(ctx.run, found_E, tokens)

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves the thresholds towards what the micro-batches of the step, on all ranks, have measured."""
        self.threshold.move(ctx.run)
