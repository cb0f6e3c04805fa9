"""COMET: k decision trees choose among the experts; the cost falls as the trees harden.

Source: Ibrahim et al., "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local
Search" (KDD 2023, arXiv 2306.02824). Its local search is `moe.routers.permuted`.

Letters: T tokens, D model width, E experts, K slots a token, J trees, N = E - 1 inner nodes.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import COUNTS_SLOTS, Router
from moe.routers.configs.comet_config import CometConfig
from moe.routing.balance import loss_mean, soft_balance_loss
from moe.routing.slots import hardening_routing
from moe.routing.smooth_step import log_smooth_step
from moe.types import LayerContext, Routing

#: Half-width of the leaves' uniform initial weights, and of the nodes' as a share of gamma.
_LEAF_INIT, _NODE_INIT = 0.05, 0.01


class CometRouter(Router[CometConfig]):
    """Router by J trees of one topology: a heap of E - 1 inner nodes and E leaves, for every E.

    Node q has the children 2q + 1 and 2q + 2 and is a leaf iff q >= E - 1; expert e is the e-th leaf from the
    left. Leaves stand at depth floor(log2 E) or one below, and each can be reached.

    Attributes:
        node_weight_NJD: ``[N, J, D]`` tests of the nodes: a token goes left with probability S(w x + b).
        node_bias_NJ: ``[N, J]``.
        leaf_weight_EJD: ``[E, J, D]`` of the leaves' logits.
        leaf_bias_EJ: ``[E, J]``.
    """

    name = "comet"
    config_class = CometConfig
    host_syncs = COUNTS_SLOTS

    def create_parameters(self) -> None:
        """Registers weights and biases of nodes and leaves."""
        leaves, trees, width = self.num_experts, self.config.top_k, self.model_width
        self.node_weight_NJD = nn.Parameter(torch.empty(leaves - 1, trees, width))
        self.node_bias_NJ = nn.Parameter(torch.empty(leaves - 1, trees))
        self.leaf_weight_EJD = nn.Parameter(torch.empty(leaves, trees, width))
        self.leaf_bias_EJ = nn.Parameter(torch.empty(leaves, trees))

    @property
    def weights_sum_to_one(self) -> bool:
        """True: one softmax runs over all leaves of all trees."""
        return True

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws nodes from +-gamma/100, so that every token reaches every leaf, and leaves from +-0.05."""
        node = _NODE_INIT * self.config.gamma
        for parameter in (self.node_weight_NJD, self.node_bias_NJ):
            nn.init.uniform_(parameter, -node, node, generator=generator)
        for parameter in (self.leaf_weight_EJD, self.leaf_bias_EJ):
            nn.init.uniform_(parameter, -_LEAF_INIT, _LEAF_INIT, generator=generator)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the experts whose leaves it reaches in any tree."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            log_left_TNJ, log_right_TNJ = log_smooth_step(
                _affine(x_TD, self.node_weight_NJD, self.node_bias_NJ), self.config.gamma
            )
            log_p_TEJ = leaf_log_probs(log_left_TNJ, log_right_TNJ)
            scores_TEJ = _affine(x_TD, self.leaf_weight_EJD, self.leaf_bias_EJ) + log_p_TEJ
            shares_TEJ = scores_TEJ.flatten(1).softmax(-1).view_as(scores_TEJ)
            gates_TE = shares_TEJ.sum(-1)
            gates_TE = gates_TE / gates_TE.sum(-1, keepdim=True)
            losses = self._losses(log_p_TEJ, gates_TE, ctx) if self.training else {}
        return hardening_routing(
            gates_TE, log_left_TNJ.isinf() | log_right_TNJ.isinf(), "hard_nodes", losses, ctx
        )

    def _losses(self, log_p_TEJ: Tensor, gates_TE: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
        losses = {}
        if self.config.entropy_coef:
            losses["entropy"] = self.config.entropy_coef * loss_mean(_entropy_T(log_p_TEJ), ctx)
        if self.config.balance_coef:
            losses["balance"] = self.config.balance_coef * soft_balance_loss(gates_TE, ctx)
        return losses


def leaf_log_probs(log_left_TNJ: Tensor, log_right_TNJ: Tensor) -> Tensor:
    """Returns ``[T, E, J]``: the log probability of each leaf, the sum of the logs along its path.

    The heap is walked level by level: nodes of depth d have the indices 2^d - 1 ... 2^(d+1) - 2. On the last
    full level the first E - 2^d nodes are inner ones; their leaves precede the leaves of this level.

    Args:
        log_left_TNJ: ``[T, E - 1, J]`` log of the share that each node sends left; -inf for none.
        log_right_TNJ: The same to the right.
    """
    T, N, J = log_left_TNJ.shape
    level_TnJ = log_left_TNJ.new_zeros(T, 1, J)
    first = 0
    while first < N:
        inner = min(level_TnJ.shape[1], N - first)
        above_TnJ, here = level_TnJ[:, :inner], slice(first, first + inner)
        children = (above_TnJ + log_left_TNJ[:, here], above_TnJ + log_right_TNJ[:, here])
        first += level_TnJ.shape[1]
        level_TnJ = torch.cat([torch.stack(children, 2).flatten(1, 2), level_TnJ[:, inner:]], 1)
    return level_TnJ


def _affine(x_TD: Tensor, weight_NJD: Tensor, bias_NJ: Tensor) -> Tensor:
    """Returns ``x W^T + b``, ``[T, N, J]``."""
    out = x_TD @ weight_NJD.flatten(0, 1).to(x_TD.dtype).t() + bias_NJ.flatten().to(x_TD.dtype)
    return out.view(len(x_TD), *bias_NJ.shape)


def _entropy_T(log_p_TEJ: Tensor) -> Tensor:
    """Returns the entropy of each token's leaves, summed over trees, in nats; probability 0 adds 0."""
    finite_TEJ = log_p_TEJ.masked_fill(log_p_TEJ.isinf(), 0)
    return -(log_p_TEJ.exp() * finite_TEJ).sum((1, 2))
