"""LLaMA-MoE v2: a shared expert of neurons important to all tokens, routed experts for clusters of tokens.

Source: Qu et al. 2024 (arXiv 2411.15708), MLP-MoE, and its release. The layer's inputs are clustered, and the
centroids become the router's rows, so that tokens go to the experts that hold their neurons. Its attention
experts are in `moe.attention.routed_attention`. Of its alignment of output moments, the deviation is
implemented; the mean is not, as it needs a bias that Mixtral lacks.

Letters: D model width, E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.types import unless
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, FFNShape, LayerPlan, RouterStart
from moe.upcycle.llama_moe import share_and_divide
from moe.upcycle.partition import is_whole, parts_plan


@dataclass(frozen=True)
class LlamaMoEV2Config(UpcycleConfig):
    """Config of `LlamaMoEV2`."""

    name: Literal["llama_moe_v2"] = "llama_moe_v2"
    num_experts: int = 7
    """Routed experts."""
    layers: str | list[int] = "inner:1"
    """Layers that become MoE layers; the release leaves the first and the last dense."""
    residual: bool = True
    """Make a shared expert beside the routed ones, all by importance; false cuts the dense network into runs
    of neurons."""
    router_rows: Literal["centroids", "raw_centroids", "drawn"] = "centroids"
    """``centroids`` divided by their mean squared length, so that a logit is about 1 at its own centroid;
    ``raw_centroids`` as the release: the choice is the same, and its weights are nearly 0 and 1."""
    cluster_tokens: int = 8192
    """Tokens that are clustered."""
    align_outputs: bool = False
    """Rescale each layer's outputs to the deviation of the dense network's, channel by channel, on the tokens
    of the equivalence check."""
    scale_factor: float | None = None
    """Factor on the routed experts' output, folded into their down projections. None takes K with a shared
    expert (1 for the release's top-1), so that experts weigh about 1, and E / K without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "experts that count nothing cannot learn",
                "Set it above 0.",
            ),
            (
                self.cluster_tokens >= self.num_experts,
                "cluster_tokens",
                "every cluster needs a token",
                "Set it to num_experts or more; thousands are usual.",
            ),
        )

    @property
    def num_parts(self) -> int:
        """Equal parts that the dense neurons are cut into."""
        return self.num_experts + int(self.residual)

    @property
    def sets_rows(self) -> bool:
        """True if the router begins at centroids."""
        return self.residual and self.router_rows != "drawn"

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.residual, "residual=false cuts without measuring", "router_rows", "cluster_tokens")


class LlamaMoEV2(UpcycleMethod[LlamaMoEV2Config]):
    """Method that makes one shared expert and divides the other neurons."""

    name = "llama_moe_v2"
    config_class = LlamaMoEV2Config
    starts_router = True

    @property
    def statistics(self) -> tuple[str, ...]:
        """Importance by cluster and the clusters' centroids."""
        return ("importance_EF", "centroids_ED") if self.config.residual else ()

    @property
    def aligns_outputs(self) -> bool:
        """See `LlamaMoEV2Config.align_outputs`."""
        return self.config.align_outputs

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Asks for as many clusters as experts."""
        if not self.config.residual:
            return {}
        return {
            "centroids_ED": {"num_clusters": self.config.num_experts},
            "inputs_TD": {"num_tokens": self.config.cluster_tokens},
        }

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True only if every token uses every expert, at weight 1."""
        gates = observe(router.config, router.num_experts)
        return is_whole(gates, router.num_experts, self._factor(gates))

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires parts of one width, and a router whose rows can be centroids."""
        config, found = self.config, []
        if shape is not None and shape.width % config.num_parts:
            rule = (
                f"the {shape.width} neurons of the dense network do not divide into {config.num_parts} parts"
            )
            found.append(Mistake("upcycle.num_experts", config.num_experts, rule, "Set another number."))
        if config.sets_rows and not observe(router, config.num_experts).has_rows:
            rule = f"the router {router.name!r} has no row for each expert that could begin at a centroid"
            remedy = "Set upcycle.router_rows=drawn, or choose a router such as topk."
            found.append(Mistake("upcycle.router_rows", config.router_rows, rule, remedy))
        return found

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Divides the neurons by importance, or into runs."""
        factor = self._factor(self.gates)
        if not self.config.residual:
            return parts_plan(torch.arange(shape.width).chunk(self.config.num_experts), factor, self.gates)
        groups_EM, shared_F = share_and_divide(statistics["importance_EF"], 1)
        plan = parts_plan(list(groups_EM), factor, self.gates, shared_F)
        if not self.config.sets_rows:
            return plan
        rows_ED = statistics["centroids_ED"]
        if self.config.router_rows == "centroids":
            # One factor for all rows, which keeps the order of the logits.
            rows_ED = rows_ED / rows_ED.square().sum(1).mean().clamp_min(1e-30)
        return replace(plan, router=RouterStart(rows_ED=rows_ED))

    def _factor(self, gates: Gates) -> float:
        own = gates.top_k if self.config.residual else self.config.num_experts / gates.top_k
        return self.config.scale_factor or float(own)
