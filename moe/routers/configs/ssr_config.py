"""Options of `moe.routers.ssr`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from moe.errors import require
from moe.routers.configs.projection_config import ProjectionConfig
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.types import unless


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
