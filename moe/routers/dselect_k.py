"""DSelect-k: k selectors each spell an expert's binary code, bit by bit, with exact zeros and ones.

Source: Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to
Multi-Task Learning" (NeurIPS 2021, arXiv 2106.03760).

Letters: T tokens, D model width, E experts, K slots a token, J selectors, M = ceil(log2 E) bits.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import COUNTS_SLOTS, Router
from moe.routers.configs.dselect_k_config import DSelectKConfig
from moe.routing.balance import loss_mean, soft_balance_loss
from moe.routing.slots import hardening_routing
from moe.routing.smooth_step import smooth_step
from moe.types import LayerContext, Routing

#: Half-width of the initial mixing weights; half-width of the bits as a share of gamma; floor in the penalty.
_MIX_INIT, _BIT_INIT, _PENALTY_FLOOR = 0.05, 0.01, 1e-6


class DSelectKRouter(Router[DSelectKConfig]):
    """Router by J selectors, mixed by a softmax: ``g = sum_j softmax(mix)_j r^j``.

    Attributes:
        bit_weight_JMD: ``[J, M, D]``, None for a static gate.
        bit_bias_JM: ``[J, M]``: the bias of a per-example gate; a static gate has nothing else.
        mix_weight_JD: ``[J, D]``, None for a static gate.
        mix_bias_J: ``[J]``.
    """

    name = "dselect_k"
    config_class = DSelectKConfig
    host_syncs = COUNTS_SLOTS

    def create_parameters(self) -> None:
        """Registers weights and biases of bits and mixing; a static gate has no weights."""
        J, M, D = self.config.top_k, code_length(self.num_experts), self.model_width
        reads = self.config.gate == "per_example"
        self.bit_weight_JMD = nn.Parameter(torch.empty(J, M, D)) if reads else None
        self.bit_bias_JM = nn.Parameter(torch.empty(J, M))
        self.mix_weight_JD = nn.Parameter(torch.empty(J, D)) if reads else None
        self.mix_bias_J = nn.Parameter(torch.empty(J))

    @property
    def weights_sum_to_one(self) -> bool:
        """True unless codes without an expert may hold some of the mass."""
        return self.config.unreachable == "renormalise" or not self._has_unreachable

    @property
    def _has_unreachable(self) -> bool:
        return self.num_experts != 1 << code_length(self.num_experts)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws bits from +-gamma/100, so that every code is reached, and mixing weights from +-0.05."""
        bit = _BIT_INIT * self.config.gamma
        bounds = {self.bit_weight_JMD: bit, self.bit_bias_JM: bit}
        bounds |= {self.mix_weight_JD: _MIX_INIT, self.mix_bias_J: _MIX_INIT}
        for parameter, bound in bounds.items():
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the experts whose codes its selectors reach."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            bits_TJM, mix_TJ = self._affine(x_TD)
            one_TJM, zero_TJM = smooth_step(bits_TJM, self.config.gamma)
            renormalise = self.config.unreachable == "renormalise"
            chosen_TJE = selector_probs(one_TJM, zero_TJM, self.num_experts, renormalise=renormalise)
            gates_TE = (mix_TJ.softmax(-1)[..., None] * chosen_TJE).sum(1)
            if self.weights_sum_to_one:
                gates_TE = gates_TE / gates_TE.sum(-1, keepdim=True)
            losses = self._losses(chosen_TJE, gates_TE, ctx) if self.training else {}
        return hardening_routing(gates_TE, (one_TJM == 0) | (zero_TJM == 0), "hard_bits", losses, ctx)

    def _affine(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``[T, J, M]`` arguments of the bits and ``[T, J]`` logits of the mixing weights."""
        T, dtype = len(x_TD), x_TD.dtype
        bits_JM, mix_J = self.bit_bias_JM.to(dtype), self.mix_bias_J.to(dtype)
        if self.bit_weight_JMD is None or self.mix_weight_JD is None:
            return bits_JM.expand(T, -1, -1), mix_J.expand(T, -1)
        bits_TN = x_TD @ self.bit_weight_JMD.flatten(0, 1).to(dtype).t()
        return bits_TN.view(T, *bits_JM.shape) + bits_JM, x_TD @ self.mix_weight_JD.to(dtype).t() + mix_J

    def _losses(self, chosen_TJE: Tensor, gates_TE: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
        losses = {}
        if self.config.entropy_coef:
            # A probability of 0 adds 0 and has no gradient, as its bits are flat there.
            safe_TJE = torch.where(chosen_TJE > 0, chosen_TJE, 1.0)
            entropy_T = -(safe_TJE * safe_TJE.log()).sum((1, 2))
            losses["entropy"] = self.config.entropy_coef * loss_mean(entropy_T, ctx)
        if self.config.balance_coef:
            losses["balance"] = self.config.balance_coef * soft_balance_loss(gates_TE, ctx)
        if self.config.penalty_coef and not self.weights_sum_to_one:
            excess_T = (1 / (chosen_TJE.sum(-1) + _PENALTY_FLOOR)).sum(-1)
            losses["unreachable"] = self.config.penalty_coef * loss_mean(excess_T, ctx)
        return losses


def code_length(num_experts: int) -> int:
    """Returns M, the bits that tell E experts apart: ceil(log2 E), 0 for one expert."""
    return max(num_experts - 1, 0).bit_length()


def selector_probs(one_TJM: Tensor, zero_TJM: Tensor, num_experts: int, *, renormalise: bool) -> Tensor:
    """Returns ``[T, J, E]``: the product over the bits of an expert's code, most significant first.

    Codes of E and above belong to no expert. They come last among codes of a common prefix, so that each bit
    merely cuts off the children without experts. If a prefix has one child left, ``renormalise`` gives it all
    of its parent's mass. Dividing the whole product by its sum instead would be 0/0 for a selector that sits
    on a code without an expert; here nothing is divided.

    Args:
        one_TJM: ``[T, J, M]`` probability that a bit is 1.
        zero_TJM: Probability that a bit is 0.
        num_experts: E.
        renormalise: Makes probabilities sum to 1 where E is no power of 2; else they sum to at most 1.
    """
    T, J, M = one_TJM.shape
    starts_TJn = one_TJM.new_ones(T, J, 1)
    for bit in range(M):
        sides = (starts_TJn * zero_TJM[..., bit, None], starts_TJn * one_TJM[..., bit, None])
        reached = -(-num_experts >> (M - bit - 1))
        next_TJn = torch.stack(sides, -1).flatten(2)[..., :reached]
        if renormalise and reached % 2:
            next_TJn = torch.cat([next_TJn[..., :-1], starts_TJn[..., -1:]], -1)
        starts_TJn = next_TJn
    return starts_TJn
