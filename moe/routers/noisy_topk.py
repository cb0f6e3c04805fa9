"""Noisy top-k gating: noise on the logits tries every expert, and two losses keep all of them busy.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, Eq. 3-5 for the gate, Eq. 6-7 for importance, appendix A for
load); V-MoE (arXiv 2106.05974, section 2.1 and appendix A). The floor of 0.01 on the learned noise is that of
Tensor2Tensor's code; the paper has none.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.routers.base import NOISE_KEY_ON_HOST
from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from moe.routers.linear import LinearRouter
from moe.routing.draws import normal_noise
from moe.routing.load_importance import importance_loss
from moe.types import LayerContext, Routing

_NOISE_FLOOR = 0.01


class NoisyTopKRouter(LinearRouter[NoisyTopKConfig]):
    """Router by top-k of logits plus Gaussian noise in training, of the logits in evaluation.

    Attributes:
        noise_weight_ED: ``[E, D]`` weights of the learned noise; None with ``form=vmoe``.
    """

    name = "noisy_topk"
    config_class = NoisyTopKConfig
    compile_unsupported_reason = NOISE_KEY_ON_HOST

    def create_parameters(self) -> None:
        """Registers projection and noise weights."""
        super().create_parameters()
        learned = torch.zeros(self.num_experts, self.model_width)
        self.noise_weight_ED = nn.Parameter(learned) if self._learns_noise else None

    @property
    def _learns_noise(self) -> bool:
        return self.config.form == "shazeer" and self.config.noise_scale > 0

    @property
    def weights_sum_to_one(self) -> bool:
        """True for the softmax over the selected logits."""
        return self.config.form == "shazeer"

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal gate weights; zeroes the noise weights, i.e. noise has standard deviation ln 2."""
        super().reset_parameters(generator)
        if self.noise_weight_ED is not None:
            nn.init.zeros_(self.noise_weight_ED)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the K experts of highest noisy logit."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            std_TE = self._noise_std(x_TD, logits_TE)
            noisy_TE = logits_TE if std_TE is None else self._add_noise(logits_TE, std_TE, ctx)
            top_TK, ids_TK = noisy_TE.topk(ctx.top_k(self.top_k), dim=-1)
            if self.config.form == "shazeer":
                weights_TK = top_TK.softmax(-1)
            else:
                weights_TK = noisy_TE.softmax(-1).gather(-1, ids_TK)
            probs_TE = logits_TE.softmax(-1)
            gates_TE = probs_TE
            if self.training and self.config.form == "shazeer":
                gates_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, weights_TK)
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx, gates_TE)
            losses |= self._load_loss(logits_TE, noisy_TE, std_TE, ctx)
        return Routing(
            ids_TK, weights_TK, self.num_experts, scores_TE=probs_TE, logits_TE=logits_TE, losses=losses
        )

    def _noise_std(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor | None:
        """Returns the ``[T, E]`` standard deviation of the noise; None without noise."""
        if not self.training or self.config.noise_scale == 0:
            return None
        if self.noise_weight_ED is None:
            return torch.full_like(logits_TE, self.config.noise_scale / self.num_experts)
        dtype = logits_TE.dtype
        raw_TE = x_TD.to(dtype) @ self.noise_weight_ED.to(dtype).t()
        return self.config.noise_scale * (F.softplus(raw_TE) + _NOISE_FLOOR)

    def _add_noise(self, logits_TE: Tensor, std_TE: Tensor, ctx: LayerContext) -> Tensor:
        (T, E), device = logits_TE.shape, logits_TE.device
        return logits_TE + std_TE * normal_noise(self.config.noise_seed, "noisy_topk", T, E, ctx, device)

    def _load_loss(
        self, logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor | None, ctx: LayerContext
    ) -> dict[str, Tensor]:
        # With K = E every expert gets every token whatever the noise is.
        top_k = ctx.top_k(self.top_k)
        if not self.config.load_coef or std_TE is None or top_k == self.num_experts:
            return {}
        one_bar = self.config.form == "vmoe"
        chance_TE = chance_of_selection(logits_TE, noisy_TE, std_TE, top_k, one_bar=one_bar)
        return {"load": self.config.load_coef * importance_loss("micro_batch", chance_TE, ctx)}


def chance_of_selection(
    logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int, *, one_bar: bool = False
) -> Tensor:
    """Computes the ``[T, E]`` probability that an expert is among the K best if its noise were redrawn.

    Shazeer et al., appendix A, Eq. 8-9: the expert must beat the K-th highest noisy logit of the others.
    V-MoE takes the K-th highest of all as the bar of every expert (appendix A, and its code), so that the
    chosen ones have to beat the last of themselves.

    Args:
        logits_TE: Logits without noise.
        noisy_TE: Logits with noise.
        std_TE: Standard deviation of the noise, above 0.
        top_k: K, below E.
        one_bar: Takes V-MoE's bar.
    """
    best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    kth_T1, next_T1 = best_TK[:, -2:-1], best_TK[:, -1:]
    # An expert at or above the K-th has K - 1 others above it, so the next one below is its bar.
    bar_TE = kth_T1 if one_bar else torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
    # Clamped, so that an expert at -infinity has probability 0 and no gradient instead of NaN.
    margin_TE = (logits_TE - bar_TE).clamp(-1e30, 1e30)
    chance_TE: Tensor = torch.special.ndtr(margin_TE / std_TE)
    return chance_TE
