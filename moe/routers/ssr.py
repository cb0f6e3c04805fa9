"""Selective Sinkhorn Routing: top-k softmax, replaced by a balanced transport plan on a few steps.

Source: Nguyen, Ta, Le Duc, Nguyen, Tran 2025 (arXiv 2511.08972), known to us from two secondary accounts.
They agree on the objective, the gate and the selection; where they differ (cost, noise site, gradient, draw)
each choice is an option here, see docs/routers/transport.md.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.configs.ssr_config import SSRConfig
from moe.routers.projection import ProjectionRouter, select_top_k
from moe.routing.draws import hashed_uniform, normal_noise
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from moe.types import LayerContext, Routing


class SSRRouter(ProjectionRouter[SSRConfig]):
    """Top-k softmax router that, on a few randomly drawn steps, routes by a balanced transport plan.

    The plan acts only in training. As u cancels within a row, a transport step is top-k softmax of
    ``cost / xi + v`` with a bias v for each expert that is computed for this batch.
    """

    name = "ssr"
    config_class = SSRConfig
    host_syncs = (
        "only on steps that transport: every check_every iterations, to learn whether Sinkhorn has converged"
    )
    compile_unsupported_reason = (
        "whether a step transports is a hash of seed, step and layer, which the host computes in every pass. "
        "Compile the experts alone"
    )

    @property
    def weights_sum_to_one(self) -> bool:
        """True for two or more experts; a single weight is not renormalised, or it would be constant."""
        return self.config.top_k > 1

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to K experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            if self.training and self.transports(ctx):
                ids_TK, weights_TK, metrics = self._by_plan(logits_TE, ctx)
            else:
                ids_TK, weights_TK = self._by_softmax(logits_TE, ctx)
                metrics = _metrics(logits_TE, 0.0)
            scores_TE = logits_TE.softmax(-1)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=metrics if self.training else {},
        )

    def transports(self, ctx: LayerContext) -> bool:
        """Returns True if this (step, layer), or micro-batch of it, was drawn: the same on every rank."""
        place: tuple[int, ...] = (ctx.run.step, ctx.layer_index)
        if self.config.draw_per == "micro_batch":
            place = (*place, ctx.run.micro_batch)
        return hashed_uniform(self.config.seed, "ssr", *place) < self.config.probability

    def _by_softmax(self, logits_TE: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        if self.training and self.config.gate_noise:
            logits_TE = logits_TE + self.config.gate_noise * self._noise(logits_TE, ctx)
        return self._top(logits_TE)

    def _by_plan(self, logits_TE: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        config = self.config
        # In fp32 the sharp kernels of small xi cannot meet the tolerance.
        cost_TE = logits_TE.double()
        if config.cost == "softmax":
            cost_TE = cost_TE.softmax(-1)
        if config.transport_noise:
            cost_TE = cost_TE + config.transport_noise * self._noise(cost_TE, ctx)
        kernel_TE = cost_TE / config.xi
        found = sinkhorn(
            kernel_TE if config.gradient == "unrolled" else kernel_TE.detach(),
            SinkhornRule(config.max_iterations, config.tolerance, check_every=config.check_every),
            mask_T=ctx.token_mask_T(len(kernel_TE)),
            group=ctx.run.group,
        )
        ids_TK, weights_TK = self._top(kernel_TE + found.column_E)
        weights_TK = weights_TK.to(logits_TE.dtype)
        if config.gradient == "none":
            # Zero, and not absent: data parallelism waits for a gradient of every parameter.
            weights_TK = weights_TK.detach() + 0.0 * logits_TE.gather(-1, ids_TK)
        metrics = _metrics(logits_TE, 1.0, found.iterations, found.residual)
        return ids_TK, weights_TK, metrics

    def _top(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE if self.weights_sum_to_one else logits_TE.softmax(-1)
        return select_top_k(logits_TE, scores_TE, self.top_k, renormalise=self.weights_sum_to_one)

    def _noise(self, like_TE: Tensor, ctx: LayerContext) -> Tensor:
        """Draws standard normal noise; the same when the micro-batch is recomputed."""
        T, E = like_TE.shape
        return normal_noise(self.config.seed, "ssr", T, E, ctx, like_TE.device).to(like_TE.dtype)


def _metrics(
    like: Tensor, transported: float, iterations: Tensor | None = None, residual: Tensor | None = None
) -> dict[str, Tensor]:
    """Returns the same names on every step, so that all ranks and layers report alike."""
    zero = like.new_zeros(())
    return {
        "transported": zero + transported,
        "sinkhorn_iterations": zero if iterations is None else iterations.to(zero),
        "sinkhorn_residual": zero if residual is None else residual.detach().to(zero),
    }
