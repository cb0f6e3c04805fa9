"""Selective Sinkhorn Routing: top-k softmax, replaced by a balanced transport plan on a few steps.

Source: Nguyen, Ta, Le Duc, Nguyen, Tran 2025 (arXiv 2511.08972), known to us from two secondary accounts.
They agree on the objective, the gate and the selection; where they differ (cost, noise site, gradient, draw)
each choice is an option here, see docs/routers/transport.md.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.projection import ProjectionConfig, ProjectionRouter, select_top_k
from moe.routing.draws import hashed_uniform, normal_noise
from moe.routing.transport import SinkhornRule, sinkhorn
from moe.types import LayerContext, Routing, unless


@dataclass(frozen=True)
class TransportConfig(ProjectionConfig):
    """Options of the transport plan that routes a step."""

    cost: Literal["softmax", "linear"] = "softmax"
    """Cost that the plan transports by: the softmax of the logits (SSR-S) or the logits (SSR-L)."""
    xi: float = 0.05
    """Entropy weight: the plan's temperature. About 0.05 for softmax cost, 0.5 to 1 for linear cost."""
    max_iterations: int = 100
    """Upper bound on Sinkhorn iterations."""
    tolerance: float = 1e-4
    """L2 norm of the error of the plan's column sums, in tokens, at which Sinkhorn stops."""
    check_every: int = 10
    """Iterations between two reads of the tolerance by the host; the result does not depend on it."""
    transport_noise: float = 0.0
    """Standard deviation of Gaussian noise on the cost of transport steps."""
    gradient: Literal["potentials_detached", "unrolled", "none"] = "potentials_detached"
    """Gradient of a transport step: through the softmax of cost/xi + bias with the bias constant, through
    Sinkhorn's iterations as well, or none."""


@dataclass(frozen=True)
class SSRConfig(TransportConfig):
    """Config of `SSRRouter`."""

    name: Literal["ssr"] = "ssr"
    probability: float = 0.001
    """Probability that a (step, layer) is routed by the transport plan; 0.001 to 0.01 is published."""
    gate_noise: float = 0.0
    """Standard deviation of Gaussian noise on the logits of ordinary training steps."""
    draw_per: Literal["step", "micro_batch"] = "step"
    """Draw once per step, or once per micro-batch; layers always draw independently."""
    seed: int = 0
    """Seed of the draws and the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                0 <= self.probability <= 1,
                "probability",
                "it is a share of the steps",
                "Set it between 0 and 1.",
            ),
            (self.xi > 0, "xi", "a temperature is positive", "Set it above 0; 0.05 to 1 is usual."),
            *(
                (
                    getattr(self, noise) >= 0,
                    noise,
                    "a standard deviation is not negative",
                    "Set it to 0 or more.",
                )
                for noise in ("gate_noise", "transport_noise")
            ),
        )
        # Rejects invalid fields by name.
        SinkhornRule(self.max_iterations, self.tolerance, check_every=self.check_every)

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        planned = {f.name for f in fields(TransportConfig)} - {f.name for f in fields(ProjectionConfig)}
        return unless(
            self.probability > 0, "probability is 0, and nothing is transported", *planned
        ) | unless(self.gate_noise > 0 or self.probability > 0, "nothing is drawn", "seed", "draw_per")


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
