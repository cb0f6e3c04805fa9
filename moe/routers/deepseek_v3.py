"""DeepSeek's routers: sigmoid or softmax scores, groups, and a bias that balances without a loss.

Sources: DeepSeek-V3 (arXiv 2412.19437, Eq. 13-20: sigmoid scores, a bias for selection alone, the
sequence-wise loss), Wang et al. 2024 (arXiv 2408.15664: the bias update), DeepSeek-V2 (arXiv 2405.04434:
groups by their best softmax score). DeepSeek-V3's inference code scores a group by the sum of its two best
biased scores, Megatron-core by the sum of its K / top_groups best.

Letters: T tokens, E experts, K experts a token, G groups of experts, N of any.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from moe.routers.base import FILED_BY_STEP
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.linear import LinearRouter
from moe.routers.projection import normalise_scores, score_logits
from moe.routing.balance import count_load
from moe.routing.step_state import Fp32Buffers, StepSums
from moe.types import LayerContext, Routing


class DeepSeekV3Router(Fp32Buffers, LinearRouter[DeepSeekV3Config]):
    """Router that selects by score plus bias within the best groups, and weighs by the score alone.

    Attributes:
        bias_E: ``[E]`` fp32, saved with the model; it has no gradient and moves after optimizer steps only.
    """

    name = "deepseek_v3"
    config_class = DeepSeekV3Config
    compile_unsupported_reason = FILED_BY_STEP
    fp32_buffers: ClassVar[tuple[str, ...]] = ("bias_E",)
    bias_E: Tensor

    def create_parameters(self) -> None:
        """Registers projection and bias."""
        super().create_parameters()
        self.register_buffer("bias_E", torch.zeros(self.num_experts, dtype=torch.float32))
        self._slots = StepSums()

    @property
    def weights_sum_to_one(self) -> bool:
        """True for renormalised weights that are not scaled."""
        return self.config.renormalise and self.config.routed_scaling == 1.0

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal weights; sets the bias to 0."""
        super().reset_parameters(generator)
        self.bias_E.zero_()

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the K experts of highest biased score in its best groups."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = score_logits(logits_TE, self.config.score)
            ids_TK = self._select(scores_TE.detach() + self.bias_E, ctx.top_k(self.top_k))
            weights_TK = self._weights(logits_TE, scores_TE, ids_TK)
            probs_TE = scores_TE
            if self.config.score == "sigmoid":
                probs_TE = normalise_scores(logits_TE, "sigmoid")
            losses = self.balance_losses(logits_TE, probs_TE, self._counted(logits_TE, ids_TK), ctx)
        if self.training and self.config.bias_rate:
            # This rank's own counts: ranks are summed once a step instead of once a micro-batch.
            self._slots.write(
                ctx.run, count_load(ids_TK, self.num_experts, ctx.token_mask_T(len(ids_TK))).counts_E
            )
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            losses=losses,
            metrics=self._bias_metrics(),
        )

    def _counted(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Returns the ``[T, K]`` experts that the balance loss counts."""
        if self.config.balance_counts == "chosen":
            return ids_TK
        # Scores rise with logits, which tie less often.
        return logits_TE.detach().topk(ids_TK.shape[1], dim=-1, sorted=False).indices

    def _select(self, choice_TE: Tensor, top_k: int) -> Tensor:
        """Returns the ``[T, K]`` experts with the highest selection scores."""
        config, T = self.config, len(choice_TE)
        if config.num_groups > 1:
            size = self.num_experts // config.num_groups
            choice_TGN = choice_TE.view(T, config.num_groups, size)
            best = {"top2_sum": 2, "share_sum": top_k // config.top_groups, "max": 1}[config.group_score]
            score_TG = choice_TGN.topk(min(best, size), dim=-1).values.sum(-1)
            top_TN = score_TG.topk(config.top_groups, dim=-1, sorted=False).indices
            shut_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, top_TN, False)
            # Not 0: a biased score may be below it.
            choice_TE = choice_TGN.masked_fill(shut_TG[:, :, None], -torch.inf).view(T, self.num_experts)
        return choice_TE.topk(top_k, dim=-1, sorted=False).indices

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        if self.config.renormalise:
            weights_TK = normalise_scores(logits_TE.gather(-1, ids_TK), self.config.score)
        else:
            weights_TK = scores_TE.gather(-1, ids_TK)
        return weights_TK if self.config.routed_scaling == 1.0 else weights_TK * self.config.routed_scaling

    def _bias_metrics(self) -> dict[str, Tensor]:
        if not self.config.bias_rate:
            return {}
        spread = self.bias_E.amax() - self.bias_E.amin()
        return {"bias_spread": spread, "bias_alarm": (spread >= 1).float()}

    @torch.no_grad()
    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves every expert's bias towards even load over the step's whole batch on all ranks."""
        config, run = self.config, ctx.run
        taken_E = self._slots.take()
        stopped = config.bias_stop_step is not None and run.step > config.bias_stop_step
        if config.bias_rate == 0 or stopped:
            return
        counts_E = torch.zeros_like(self.bias_E) if taken_E is None else taken_E
        if run.group is not None:
            torch.distributed.all_reduce(counts_E, group=run.group)
        excess_E = counts_E.mean() - counts_E
        if config.bias_update == "sign":
            self.bias_E.add_(excess_E.sign(), alpha=config.bias_rate)
        else:
            self.bias_E.add_(excess_E / counts_E.mean().clamp_min(1e-20), alpha=config.bias_rate)
