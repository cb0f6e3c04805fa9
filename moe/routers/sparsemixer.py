"""SparseMixer: experts are sampled, and the gradient of the choice itself is estimated.

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

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.linear import LinearRouter, LinearRouterConfig
from moe.routing.noise import gumbel_noise, uniform_noise
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class SparseMixerConfig(LinearRouterConfig):
    """Config of `SparseMixerRouter`."""

    name: Literal["sparsemixer"] = "sparsemixer"
    version: Literal["v1", "v2"] = "v2"
    """``v1``: one expert, mid-point. ``v2``: one or two, Heun."""
    jitter: float = 0.1
    """An expert is not sampled when its logit is below the best by more than twice this share of the larger
    magnitude of the two."""
    noise_seed: int = 0
    """Seed of the draws; conf/router follows the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 if self.version == "v1" else 2
        remedy = f"Set router.top_k={most}" + (" or router.version=v2." if most == 1 else ".")
        require(
            self,
            (
                self.top_k <= most,
                "top_k",
                f"SparseMixer {self.version} samples at most {most} a token",
                remedy,
            ),
            (
                self.jitter > 0,
                "jitter",
                "without it only the best expert is left to sample",
                "Set it above 0.",
            ),
        )


class SparseMixerRouter(LinearRouter[SparseMixerConfig]):
    """Experts by Gumbel-max sampling in training and by argmax in evaluation, weighed by their probability.

    The second expert is sampled from those left, and weighed by its probability among them: the two weights
    do not sum to 1.
    """

    name = "sparsemixer"
    config_class = SparseMixerConfig
    compile_unsupported_reason: ClassVar[str | None] = (
        "the key of its noise is a hash of seed, step, micro-batch and layer, made by the host in each pass. "
        "Compile the experts alone"
    )

    @property
    def weights_sum_to_one(self) -> bool:
        """Never: each weight is a probability among the experts that were within reach."""
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
            # v1's module balances the masked probabilities; Phi-3.5-MoE those of all experts.
            balanced_TE = first_probs_TE if self.config.version == "v1" else logits_TE.softmax(-1)
            losses = self.balance_losses(logits_TE, balanced_TE, ids_TK, ctx)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=torch.cat(weights, 1),
            num_experts=self.num_experts,
            scores_TE=first_probs_TE,
            logits_TE=logits_TE,
            losses=losses,
        )

    def _pick(self, probs_TE: Tensor, slot: int, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """``[T, 1]`` expert and weight of one slot."""
        best_T1 = probs_TE.argmax(-1, keepdim=True)
        if not self.training:
            return best_T1, probs_TE.gather(1, best_T1)
        (T, E), device, seed = probs_TE.shape, probs_TE.device, self.config.noise_seed
        noise_TE = gumbel_noise(seed, f"sparsemixer sample {slot}", T, E, ctx, device)
        ids_T1 = (probs_TE.detach().log() + noise_TE).argmax(-1, keepdim=True)
        chance_T1 = uniform_noise(seed, f"sparsemixer point {slot}", T, 1, ctx, device)
        return ids_T1, estimate(probs_TE.gather(1, ids_T1), ids_T1 == best_T1, chance_T1, self.config.version)


def mask_out_of_reach(logits_TE: Tensor, left_TE: Tensor, jitter: float) -> Tensor:
    """A copy of the logits, -infinity where an expert would not be sampled.

    Out of reach: ``max - z > 2 jitter max(|z|, max)``, the maximum taken over the experts that are left.

    Args:
        logits_TE: Of all experts.
        left_TE: The same, -infinity where an expert has been taken.
        jitter: Half of the share of the magnitude that a logit may be lower by.
    """
    with torch.no_grad():
        best_T1 = left_TE.amax(-1, keepdim=True)
        reach_TE = 2 * jitter * torch.maximum(logits_TE.abs(), best_T1)
        far_TE = best_T1 - logits_TE > reach_TE
    return left_TE.masked_fill(far_TE, -torch.inf)


class _ScaledForward(torch.autograd.Function):
    """Forward: the weight times a factor. Backward: the gradient times a constant, whatever the factor."""

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
    """The weights of sampled experts with the gradient estimate of SparseMixer.

    v1: with probability 1/2 half the weight, else the weight; twice the gradient always, as released: the
    sum of the mid-point and the end-point estimate. v2: with probability 3/4 a third of the weight, else the
    weight: Heun's rule from its far end, exact for losses that are cubic in the weight. The best expert
    always keeps its weight, so that evaluation computes what training most often does.

    Args:
        weights_T1: Probabilities of the sampled experts.
        is_best_T1: Whether the sample is the argmax.
        chance_T1: Uniform draws.
        version: Which rule.
    """
    share, factor, gain = (0.5, 0.5, 2.0) if version == "v1" else (0.75, 1 / 3, 1.0)
    whole_T1 = is_best_T1 | (chance_T1 > share)
    factor_T1 = torch.full_like(weights_T1, factor).masked_fill_(whole_T1, 1.0)
    out_T1: Tensor = _ScaledForward.apply(weights_T1, factor_T1, gain)  # type: ignore[no-untyped-call]
    return out_T1
