"""SparseMixer: experts are sampled, and the gradient of the choice is estimated.

Sources: SparseMixer (arXiv 2310.00811, the mid-point estimate) and its released module for v1;
SparseMixer-v2 in GRIN (arXiv 2409.12136, Heun's third-order estimate) and the function of Phi-3.5-MoE for
v2. Left out: the learned output scale of v1 (a factor for each of the D outputs, which a router's weights
cannot carry).

A sampled expert e adds ``p_e f_e(x)``. For a loss L of that, the exact gradient of the expected loss holds
``(L(p_e f_e) - L(0)) grad p_e``: the loss at p_e and at 0. Scaling the multiplier down in some forward passes
lets the derivative of L at p_e times a factor stand for that difference, as quadrature does.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moe.routers.base import NOISE_KEY_ON_HOST
from moe.routers.configs.sparsemixer_config import SparseMixerConfig
from moe.routers.linear import LinearRouter
from moe.routing.draws import gumbel_noise, uniform_noise
from moe.types import LayerContext, Routing


class SparseMixerRouter(LinearRouter[SparseMixerConfig]):
    """Router by Gumbel-max sampling in training and by argmax in evaluation, weighed by probability.

    The second expert is sampled from the remaining ones and weighed by its probability among them: the two
    weights do not sum to 1.
    """

    name = "sparsemixer"
    config_class = SparseMixerConfig
    compile_unsupported_reason = NOISE_KEY_ON_HOST

    @property
    def weights_sum_to_one(self) -> bool:
        """False: each weight is a probability among the experts within reach."""
        return False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Samples one or two experts for each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            ids, weights = [], []
            left_TE, first_probs_TE = logits_TE, logits_TE
            for slot in range(self.top_k):
                probs_TE = mask_out_of_reach(logits_TE, left_TE, self.config.jitter).softmax(-1)
                ids_T1, weights_T1 = self._pick(probs_TE, slot, ctx)
                ids.append(ids_T1)
                weights.append(weights_T1)
                left_TE = left_TE.scatter(1, ids_T1, -torch.inf)
                first_probs_TE = probs_TE if slot == 0 else first_probs_TE
            ids_TK = torch.cat(ids, 1)
            # v1's module balances the masked probabilities; Phi-3.5-MoE balances those of all experts.
            balanced_TE = first_probs_TE if self.config.version == "v1" else logits_TE.softmax(-1)
            losses = self.balance_losses(logits_TE, balanced_TE, ids_TK, ctx)
        return Routing(
            ids_TK,
            torch.cat(weights, 1),
            self.num_experts,
            scores_TE=first_probs_TE,
            logits_TE=logits_TE,
            losses=losses,
        )

    def _pick(self, probs_TE: Tensor, slot: int, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Returns the ``[T, 1]`` experts and weights of one slot."""
        best_T1 = probs_TE.argmax(-1, keepdim=True)
        if not self.training:
            return best_T1, probs_TE.gather(1, best_T1)
        (T, E), device, seed = probs_TE.shape, probs_TE.device, self.config.noise_seed
        noise_TE = gumbel_noise(seed, f"sparsemixer sample {slot}", T, E, ctx, device)
        ids_T1 = (probs_TE.detach().log() + noise_TE).argmax(-1, keepdim=True)
        chance_T1 = uniform_noise(seed, f"sparsemixer point {slot}", T, 1, ctx, device)
        return ids_T1, estimate(probs_TE.gather(1, ids_T1), ids_T1 == best_T1, chance_T1, self.config.version)


def mask_out_of_reach(logits_TE: Tensor, left_TE: Tensor, jitter: float) -> Tensor:
    """Returns the logits, -infinity where an expert would not be sampled.

    An expert is out of reach if ``max - z > 2 jitter max(|z|, max)``, with the maximum over remaining
    experts.

    Args:
        logits_TE: Logits of all experts.
        left_TE: The same, -infinity where an expert has been taken.
        jitter: Half of the relative distance below the maximum that is still within reach.
    """
    with torch.no_grad():
        best_T1 = left_TE.amax(-1, keepdim=True)
        reach_TE = 2 * jitter * torch.maximum(logits_TE.abs(), best_T1)
        far_TE = best_T1 - logits_TE > reach_TE
    return left_TE.masked_fill(far_TE, -torch.inf)


class _ScaledForward(torch.autograd.Function):
    """Autograd function that scales the weight by a factor and its gradient by an independent constant."""

    @staticmethod
    def forward(ctx: Any, weights_T1: Tensor, factor_T1: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return weights_T1 * factor_T1

    @staticmethod
    def backward(ctx: Any, grad_T1: Tensor) -> tuple[Tensor, None, None]:
        return grad_T1 * ctx.gain, None, None


def estimate(
    weights_T1: Tensor, is_best_T1: Tensor, chance_T1: Tensor, version: Literal["v1", "v2"]
) -> Tensor:
    """Returns the weights of sampled experts with SparseMixer's gradient estimate.

    v1: with probability 1/2 half the weight, else the weight; always twice the gradient, as released: the sum
    of the mid-point and the end-point estimate. v2: with probability 3/4 a third of the weight, else the
    weight, which is Heun's rule from its far end, exact for losses that are cubic in the weight. The best
    expert always keeps its weight, so that evaluation computes what training computes most often.

    Args:
        weights_T1: Probabilities of the sampled experts.
        is_best_T1: True where the sample is the argmax.
        chance_T1: Uniform draws.
        version: ``v1`` or ``v2``.
    """
    share, factor, gain = (0.5, 0.5, 2.0) if version == "v1" else (0.75, 1 / 3, 1.0)
    whole_T1 = is_best_T1 | (chance_T1 > share)
    factor_T1 = torch.full_like(weights_T1, factor).masked_fill_(whole_T1, 1.0)
    out_T1: Tensor = _ScaledForward.apply(weights_T1, factor_T1, gain)  # type: ignore[no-untyped-call]
    return out_T1
